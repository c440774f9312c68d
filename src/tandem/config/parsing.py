"""Settings from YAML, and as YAML; unknown names are errors."""

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
    """Read a YAML file of settings, grouped as in `Settings` or flat.

    Raises:
        UserError: not YAML, or an unknown group or key; the nearest valid name is given.
    """
    return from_dict(read_yaml(path), where=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The values of a YAML file.

    Raises:
        UserError: it cannot be read, or holds no mapping.
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
    """Settings from nested or flat plain values.

    Raises:
        UserError: names every unknown group and key, and every value of another type or out of its range.
    """

    def describe(name: str, value: Any) -> str:
        return f"{where}: {name}" if value is None else f"{where}: {name} = {value!r}"

    settings = build(Settings, flat(values, where), describe)
    check_ranges(settings.to_dict())
    return settings


def flat(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings without their groups.

    Raises:
        UserError: a setting stands in a group that is not its own.
    """
    names: dict[str, Any] = {}
    problems = []
    for key, value in values.items():
        if key not in GROUPS or not isinstance(value, dict):
            names[str(key)] = value
            continue
        for name, inner in value.items():
            if str(name).replace("-", "_") not in options_of(GROUPS[key]):
                close = nearest(str(name), list(options_of(GROUPS[key])))
                problems.append(f"{where}, group {key}: unknown setting {name!r}{close}")
            names[str(name)] = inner
    raise_all(problems)
    return names


def to_yaml(settings: Settings) -> str:
    """All settings, group by group, as `from_yaml` reads them."""
    return yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)


def departures(settings: Settings) -> dict[str, list[str]]:
    """By group, `name=value` of the settings that are not at their default."""
    defaults = Settings().to_dict()
    changed = {
        group: [f"{name}={value}" for name, value in values.items() if value != defaults[group][name]]
        for group, values in settings.to_dict().items()
    }
    return {group: values for group, values in changed.items() if values}
