"""Reads the words of `--data-path` and `--valid-data-path`."""

from __future__ import annotations

import glob
from collections.abc import Sequence

from tandem.config.settings import DataSettings
from tandem.data.datasets.blend import parse_blend
from tandem.errors import UserError
from tandem.training.logs.log import VALIDATION


def all_prefixes(data: DataSettings) -> list[str]:
    """The prefixes of all data that a run reads."""
    prefixes, _ = parse_blend(data.data_path)
    return list(dict.fromkeys([*prefixes, *named_sets(data.valid_data_path).values()]))


def named_sets(paths: Sequence[str]) -> dict[str, str]:
    """Prefixes by name, from words NAME=PREFIX. A single PREFIX gets the name "validation".

    >>> named_sets(["code=a", "math=b"])
    {'code': 'a', 'math': 'b'}
    >>> named_sets(["a"])
    {'validation': 'a'}

    Raises:
        UserError: a name is missing or given twice.
    """
    if len(paths) == 1 and split_name(paths[0])[0] is None:
        return {VALIDATION: paths[0]}
    sets: dict[str, str] = {}
    for word in paths:
        name, prefix = split_name(word)
        if not name or not prefix:
            raise UserError(f"--valid-data-path {word}: expected NAME=PREFIX, or one PREFIX alone")
        if name in sets:
            raise UserError(f"--valid-data-path: two sets have the name {name!r}")
        sets[name] = prefix
    return sets


def split_name(word: str) -> tuple[str | None, str]:
    """Split NAME=PATH into name and path. The name is None for a path alone.

    If there are files whose name starts with the whole word, the `=` is a part of the path.
    """
    name, equals, path = word.partition("=")
    return (name, path) if equals and not glob.glob(f"{glob.escape(word)}*") else (None, word)
