"""Read settings from YAML, and write them as YAML. Unknown names are errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tandem.config.checks import check_ranges
from tandem.config.settings import GROUPS, Settings
from tandem.config.yaml_file import read_yaml
from tandem.errors import raise_all
from tandem.options import build, options_of
from tandem.other_names import suggestion


def from_yaml(path: str | Path) -> Settings:
    """Read a YAML file of settings, with or without the groups of `Settings`.

    Raises:
        UserError: the file is not YAML, or has an unknown group or key. The error suggests the nearest valid name.
    """
    return from_dict(read_yaml(path), where=str(path))


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
        UserError: a setting is in the wrong group, or is given twice.
    """
    settings: dict[str, Any] = {}
    places: dict[str, str] = {}  # name of a setting -> where it was given
    problems = []
    for key, value in values.items():
        group = key if key in GROUPS and isinstance(value, dict) else None
        place = where if group is None else f"{where}, group {group}"
        for spelled, inner in (value if group is not None else {key: value}).items():
            name = str(spelled).replace("-", "_")
            if group is not None and name not in options_of(GROUPS[group]):
                close = suggestion(name, list(options_of(GROUPS[group])))
                problems.append(f"{place}: unknown setting {spelled!r}{close}")
            elif name in places:
                problems.append(f"{place}: {spelled} is also given in {places[name]}: give it once")
            places[name] = place
            settings[name] = inner
    raise_all(problems)
    return settings


def to_yaml(settings: Settings) -> str:
    """All settings by group, in the form that `from_yaml` reads."""
    return yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)


def departures(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings that differ from their default, by group and name, as plain values."""
    defaults = Settings().to_dict()
    changed = {
        group: {name: value for name, value in values.items() if value != defaults[group][name]}
        for group, values in settings.to_dict().items()
    }
    return {group: values for group, values in changed.items() if values}
