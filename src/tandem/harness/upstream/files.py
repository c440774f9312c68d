"""Reads the files of benchmarks as MindSpeed-LLM has them: CSV tables and lines of JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.files import text

Row = dict[str, Any]


def read_table(path: Path, columns: Sequence[str], *, has_header: bool) -> list[Row]:
    """The rows of a CSV file, by column.

    Args:
        columns: those that are needed; without a header, all columns in order.

    Raises:
        UserError: the file cannot be read, or a row or the header has no such columns.
    """
    lines = list(csv.reader(io.StringIO(text.read_text(path), newline="")))
    if has_header and lines:
        header = [name.strip() for name in lines.pop(0)]
        if missing := [name for name in columns if name not in header]:
            raise UserError(f"{path}:1: no column {', '.join(missing)}; its columns are {', '.join(header)}")
        places = [header.index(name) for name in columns]
    else:
        places = list(range(len(columns)))
    rows = []
    for number, cells in enumerate(lines, start=1 + has_header):
        if not cells:
            continue
        if len(cells) <= max(places):
            raise UserError(f"{path}: row {number}: {len(cells)} cells; expected {', '.join(columns)}")
        rows.append({name: cells[place].strip() for name, place in zip(columns, places)})
    return some(rows, path)


def read_lines(path: Path, fields: Sequence[str]) -> list[Row]:
    """The objects of a file of one JSON object per line. Empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line is no object with these fields.
    """
    rows = []
    for number, line in text.read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        rows.append(with_fields(row, fields, f"{path}:{number}"))
    return some(rows, path)


def with_fields(row: Any, fields: Sequence[str], where: str) -> Row:
    """The row, which is an object with these fields. Raises UserError when it is not."""
    if not isinstance(row, dict) or not set(fields) <= row.keys():
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: expected an object with {', '.join(fields)}; found {found}")
    return row


def some(rows: list[Row], path: Path) -> list[Row]:
    """The rows. Raises UserError when there are none."""
    if not rows:
        raise UserError(f"{path}: it holds no question")
    return rows


def letter(value: str, letters: str, where: str) -> int:
    """The number of a choice, by its letter.

    >>> letter("C", "ABCD", "x.csv")
    2

    Raises:
        UserError: it is none of the letters.
    """
    if len(value) != 1 or value not in letters:
        raise UserError(f"{where}: the answer {value!r} is none of {', '.join(letters)}")
    return letters.index(value)
