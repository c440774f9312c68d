"""Files of one JSON object per line, written while others read."""

from __future__ import annotations

from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from tandem.errors import UserError


def append_line(file: FileIO, values: dict[str, Any]) -> None:
    """Add a line in one write: no reader sees half of it, and no kill leaves half of it behind.

    Raises:
        UserError: the disk is full, or fails.
    """
    line = orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)
    try:
        written = file.write(line)
    except OSError as error:
        raise UserError(f"{file.name!s}: {error.strerror}") from error
    if written != len(line):
        raise UserError(f"{file.name!s}: only {written} of {len(line)} bytes were written: the disk is full")


def read_json_lines(path: Path, key: str, kind: type) -> list[dict[str, Any]]:
    """Every whole line. An unfinished last line is left out: its writer still writes, or was killed.

    Raises:
        UserError: the file cannot be read, or a line is not an object whose `key` is a `kind`.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return [parse_line(path, number, line, key, kind) for number, line in enumerate(lines, start=1)]


def parse_line(path: Path, number: int, line: bytes, key: str, kind: type) -> dict[str, Any]:
    """One line as an object.

    >>> parse_line(Path("metrics.jsonl"), 1, b'{"step": 3, "loss": 2.5}', "step", int)
    {'step': 3, 'loss': 2.5}

    Raises:
        UserError: the line is not a JSON object, or its `key` is not a `kind`.
    """
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get(key), kind):
        raise UserError(f"{path}:{number}: expected a JSON object with {key!r}; fix the line, or move the file away")
    return values
