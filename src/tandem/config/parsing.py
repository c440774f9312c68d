"""Read settings from YAML, and write them as YAML. Unknown names are errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tandem.config.checks import check_ranges
from tandem.config.settings import GROUPS, Settings
from tandem.errors import UserError, nearest, raise_all
from tandem.options import build, options_of


def from_yaml(path: str | Path) -> Settings:
    """Read a YAML file of settings, with or without the groups of `Settings`.

    Raises:
        UserError: the file is not YAML, or has an unknown group or key. The error suggests the nearest valid name.
    """
    return from_dict(read_yaml(path), where=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The values in a YAML file.

    Raises:
        UserError: the file cannot be read, or does not contain a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, got a {type(values).__name__}")
    return values


def from_dict(values: Mapping[str, Any], where: str) -> Settings:
    """Settings from plain values, in groups or without groups.

    >>> from_dict({"optimizer": {"lr": 1e-3}, "seq_length": 512}, where="example").data.seq_length
    512

    Args:
        where: the file that the values come from, for errors.

    Raises:
        UserError: lists every unknown group and key, and every value of the wrong type or out of range.
    """

    def describe(name: str, value: Any) -> str:
        return f"{where}: {name}" if value is None else f"{where}: {name} = {value!r}"

    settings = build(Settings, flat(values, where), describe)
    check_ranges(settings.to_dict())
    return settings


def flat(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of all groups in one dictionary.

    >>> flat({"optimizer": {"lr": 1e-3}, "seq_length": 512}, where="example")
    {'lr': 0.001, 'seq_length': 512}

    Raises:
        UserError: a setting is in the wrong group.
    """
    settings: dict[str, Any] = {}
    problems = []
    for key, value in values.items():
        if key not in GROUPS or not isinstance(value, dict):
            settings[str(key)] = value
            continue
        for name, inner in value.items():
            if str(name).replace("-", "_") not in options_of(GROUPS[key]):
                close = nearest(str(name), list(options_of(GROUPS[key])))
                problems.append(f"{where}, group {key}: unknown setting {name!r}{close}")
            settings[str(name)] = inner
    raise_all(problems)
    return settings


def to_yaml(settings: Settings) -> str:
    """All settings by group, in the form that `from_yaml` reads."""
    return yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)


def departures(settings: Settings) -> dict[str, list[str]]:
    """The settings that differ from their default, by group, as `name=value`."""
    defaults = Settings().to_dict()
    changed = {
        group: [f"{name}={value}" for name, value in values.items() if value != defaults[group][name]]
        for group, values in settings.to_dict().items()
    }
    return {group: values for group, values in changed.items() if values}
