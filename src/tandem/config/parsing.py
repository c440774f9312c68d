"""Flags into the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from tandem.config.checks import check_ranges
from tandem.config.settings import Settings
from tandem.config.upstream.flags import split_ignored
from tandem.config.upstream.msrun import as_torchrun
from tandem.errors import UserError, nearest

T = TypeVar("T")


def parse_dataclass(kind: type[T], command: str, description: str, argv: Sequence[str], default: T | None = None) -> T:
    """Flags, under their plain names with hyphens or underscores, into a dataclass (nested ones are groups)."""
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
    parsed: T = tyro.cli(  # type: ignore[assignment]
        kind, args=list(argv), prog=f"tandem {command}", description=description, default=default, config=config
    )
    return parsed


CONFIG_FLAG = "--config"


def parse_settings(command: str, description: str, argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings of a training command, and notices about flags that have no effect.

    `--config FILE` names a YAML file whose values the flags override.

    Raises:
        UserError: an unknown name, or a value that no run can use.
    """
    config_file, rest = _take_config(list(argv))
    rest, notices = split_ignored(as_torchrun(rest))
    default = from_yaml(config_file) if config_file else Settings()
    settings = parse_dataclass(Settings, command, description, rest, default)
    check_ranges(settings.to_dict())
    return settings, notices


def from_yaml(path: str | Path) -> Settings:
    """Read a YAML file of settings, grouped as in `Settings` or flat.

    Raises:
        UserError: not YAML, or an unknown group or key; the nearest valid name is given.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{CONFIG_FLAG} {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, found a {type(values).__name__}")
    return from_dict(values, where=str(path))


def from_dict(values: dict[str, Any], where: str) -> Settings:
    """Settings from nested or flat plain values."""
    groups = {group.name: typing.get_type_hints(Settings)[group.name] for group in dataclasses.fields(Settings)}
    owner = {field.name: group for group, kind in groups.items() for field in dataclasses.fields(kind)}
    chosen: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for key, value in values.items():
        if key in groups and isinstance(value, dict):
            for name, inner in value.items():
                _place(chosen, owner, name, inner, where, group=key)
        else:
            _place(chosen, owner, key, value, where, group=None)
    return Settings(**{group: kind(**chosen[group]) for group, kind in groups.items()})


def to_yaml(settings: Settings) -> str:
    return yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)


def departures(settings: Settings) -> dict[str, list[str]]:
    """By group, `name=value` of the settings that are not at their default."""
    defaults = Settings().to_dict()
    found = {
        group: [f"{name}={value}" for name, value in values.items() if value != defaults[group][name]]
        for group, values in settings.to_dict().items()
    }
    return {group: values for group, values in found.items() if values}


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    for index, word in enumerate(argv):
        if word.startswith(f"{CONFIG_FLAG}="):
            return word.split("=", 1)[1], argv[:index] + argv[index + 1 :]
        if word == CONFIG_FLAG:
            if index + 1 == len(argv):
                raise UserError(f"{CONFIG_FLAG} needs the name of a YAML file")
            return argv[index + 1], argv[:index] + argv[index + 2 :]
    return None, argv


def _place(
    chosen: dict[str, dict[str, Any]], owner: dict[str, str], key: str, value: Any, where: str, group: str | None
) -> None:
    name = str(key).replace("-", "_")
    if name not in owner or (group is not None and owner[name] != group):
        valid = [known for known in owner if group is None or owner[known] == group]
        place = f"{where}, group {group}" if group else where
        raise UserError(f"{place}: unknown setting {key!r}{nearest(name, valid)}")
    hints = typing.get_type_hints(_group_type(owner[name]))
    chosen[owner[name]][name] = _coerce(value, hints[name], f"{where}: {key}")


def _group_type(group: str) -> type:
    kind: type = typing.get_type_hints(Settings)[group]
    return kind


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check a YAML value against a field's type. YAML reads `1e-4` as text, so numbers in text are accepted, and `true`
    as no text, so a choice of that name is."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            word = str(value).lower() if isinstance(value, bool) else value
            if word in typing.get_args(option):
                return word
        if typing.get_origin(option) is tuple:
            items = value if isinstance(value, list) else [value]
            kinds = typing.get_args(option)
            if kinds[-1] is not Ellipsis and len(items) != len(kinds):
                continue
            return tuple(_coerce(item, kinds[0], where) if kinds[0] is not str else str(item) for item in items)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        if option is str and isinstance(value, str):
            return value
    expected = " or ".join(name for option in options for name in _names(option))
    raise UserError(f"{where} = {value!r}: expected {expected}")


def _names(option: Any) -> list[str]:
    """What may stand there, in words."""
    if typing.get_origin(option) is typing.Literal:
        return [str(choice) for choice in typing.get_args(option)]
    return ["nothing" if option is type(None) else getattr(option, "__name__", str(option))]
