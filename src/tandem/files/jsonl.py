"""Files of one JSON object per line, written while others read. A damaged line costs that line only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from tandem.errors import UserError
from tandem.files.publish import write_lines_atomically
from tandem.logs import log

DAMAGED = ".damaged"  # suffix of a copy of a file, as it was before damaged lines were taken out


def append_line(file: FileIO, values: dict[str, Any]) -> None:
    """Add a line in one write: no reader sees half of it, and neither a kill nor a full disk leaves half of it behind.

    Raises:
        UserError: the disk is full, or fails.
    """
    line = orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)
    try:
        size = os.fstat(file.fileno()).st_size
        written = file.write(line)
        if written != len(line):
            os.ftruncate(file.fileno(), size)
    except OSError as error:
        raise UserError(f"{file.name!s}: {error.strerror}") from error
    if written != len(line):
        raise UserError(f"{file.name!s}: only {written} of {len(line)} bytes were written: the disk is full")


def read_json_lines(path: Path, key: str, kind: type) -> list[dict[str, Any]]:
    """Every whole line. An unfinished last line is left out: its writer still writes, or was killed.

    A damaged line before it is left out, too, and named in the log.

    Raises:
        UserError: the file cannot be read, or none of its lines is an object whose `key` is a `kind`.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    parsed = [parse_line(line, key, kind) for line in lines]
    damaged = [number for number, values in enumerate(parsed, start=1) if values is None]
    if parsed and len(damaged) == len(parsed):
        raise UserError(f"{path}: expected lines of JSON objects with {key!r}, and there is none: move the file away")
    for number in damaged:
        log.warning("%s:%s: this line is damaged, and left out", path, number)
    return [values for values in parsed if values is not None]


def remove_damaged(path: Path, key: str, kind: type) -> None:
    """Take damaged lines out of a file, before more lines are added. Nothing is done to a file that is whole or absent.

    An unfinished last line is cut off. Where other lines are damaged, the file as it was is kept as NAME.damaged.

    Raises:
        UserError: the file cannot be read or written.
    """
    try:
        if not path.exists():
            return
        whole, end, damaged = 0, 0, list[int]()  # bytes of the file up to its last whole line
        for number, line in enumerate(_lines(path), start=1):
            end += len(line)
            if not line.endswith(b"\n"):
                break
            whole = end
            if parse_line(line, key, kind) is None:
                damaged.append(number)
        os.truncate(path, whole)
        if not damaged:
            return
        shutil.copyfile(path, path.with_name(path.name + DAMAGED))
        write_lines_atomically(path, (line for line in _lines(path) if parse_line(line, key, kind) is not None))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    numbers = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
    log.warning("%s: damaged lines are left out: %s; the file as it was is %s%s", path, numbers, path.name, DAMAGED)


def parse_line(line: bytes, key: str, kind: type) -> dict[str, Any] | None:
    """One line as an object; None when it is not one, or its `key` is not a `kind`.

    >>> parse_line(b'{"step": 3, "loss": 2.5}', "step", int)
    {'step': 3, 'loss': 2.5}
    """
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get(key), kind) else None


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file
