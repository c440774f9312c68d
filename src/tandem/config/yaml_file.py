"""Reads a YAML file of settings: each key once, and `${NAME}` stands for an environment variable."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tandem.errors import UserError
from tandem.files.text import read_text

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice. YAML itself forbids that, and PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
            if not isinstance(name, Hashable):
                continue  # an error of YAML itself
            if name in lines:
                raise UserError(f"{self.name}:{line}: {name} is also given in line {lines[name]}: give it once")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The values in a YAML file. In texts, `${NAME}` is replaced by the environment variable.

    Raises:
        UserError: the file cannot be read, does not contain a mapping, has a key twice, or names a variable that is
            not set.
    """
    loader = _EachKeyOnce(read_text(path, "--config"))
    loader.name = str(path)
    try:
        values = loader.get_single_data() or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, got a {type(values).__name__}")
    expanded: dict[str, Any] = _expanded(values, str(path))
    return expanded


def _expanded(value: Any, where: str) -> Any:
    """The value with the variables of its texts replaced. `where` is the file and the key, for errors."""
    if isinstance(value, dict):
        return {name: _expanded(inner, f"{where}: {name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, where) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{where} = {value!r}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return _VARIABLE.sub(variable, value)
