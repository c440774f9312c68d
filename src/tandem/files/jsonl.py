"""Files of one JSON object per line, written while others read."""

from __future__ import annotations

from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from tandem.errors import UserError


def append_line(file: FileIO, values: dict[str, Any]) -> None:
    """Add a line in one write, so that a reader or a kill meets no half of it.

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
    """Every whole line; an unfinished last one, of a writer that goes on or was killed, is left out.

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

    Raises:
        UserError: it is not one, or its `key` is not a `kind`.
    """
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get(key), kind):
        raise UserError(f"{path}:{number}: expected a JSON object with {key!r}; move the file away, or mend the line")
    return values
