"""Records from files, a block of rows at a time: JSON, JSON lines, plain text, CSV, Parquet and Arrow."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tandem.data.sources.compressed import COMPRESSIONS, DAMAGED, has_suffix, open_bytes
from tandem.data.sources.json_array import is_array, iter_elements
from tandem.data.sources.tables import TABLE_SUFFIXES, UnevenRow, iter_table_rows
from tandem.errors import UserError
from tandem.files.text import not_utf8

_TEXT_SUFFIXES = tuple(".txt" + compression for compression in COMPRESSIONS)
_JSON_SUFFIXES = tuple(name + compression for name in (".json", ".jsonl", ".ndjson") for compression in COMPRESSIONS)
SUFFIXES = (*_JSON_SUFFIXES, *_TEXT_SUFFIXES, *TABLE_SUFFIXES)
SUFFIXES_IN_WORDS = (
    ".json, .jsonl, .ndjson, .txt, .csv, .tsv (also with .gz, .zst, .xz or .bz2 after it), .parquet, .arrow"
)
_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1024  # a block ends when it has either
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_AT_LINE_ENDS = secrets.randbits(62)  # a random number, which no file can be made to contain


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file, not parsed yet.

    Attributes:
        first: number of the first row, from 1.
        count: number of rows; when `content` has more, only the first `count` are meant.
        content: lines end to end, or a list with a row each: the bytes of a JSON value, or the record itself.
        is_text: each line is a text, not JSON.
        source: number of the source that the file belongs to.
    """

    file: str
    first: int
    count: int
    content: bytes | list[Any]
    is_text: bool = False
    source: int = 0

    def rows(self) -> list[Any]:
        """One entry per row, as `parse_row` takes it."""
        rows = self.content.split(b"\n") if isinstance(self.content, bytes) else self.content
        return list(map(_TextLine, rows[: self.count])) if self.is_text else rows[: self.count]

    def first_row(self) -> Any:
        """The first of `rows`."""
        if not isinstance(self.content, bytes):
            return self.content[0]
        line = self.content.partition(b"\n")[0]
        return _TextLine(line) if self.is_text else line

    def place(self, index: int) -> str:
        """`file:line`, or `file:row n` where a row is not a line."""
        return f"{self.file}:{'' if isinstance(self.content, bytes) else 'row '}{self.first + index}"


class _TextLine(bytes):
    """A line of a text file: a record whose only field is `text`."""


def parse_row(row: Any, file: str = "FILE") -> dict[str, Any]:
    """The record of a row.

    Args:
        file: the row's file, for the command that an error advises.

    Raises:
        UserError: the line is empty, truncated, not UTF-8, not JSON or not an object. Or a CSV row has too many or too
            few values. The message does not name the place.
    """
    if isinstance(row, _TextLine):
        return {"text": _decode(row.rstrip(b"\r\n"), file)}
    if isinstance(row, UnevenRow):
        raise UserError(row.reason)
    try:
        value = _value_of(row) if isinstance(row, bytes) else row
    except orjson.JSONDecodeError as error:
        raise _json_error(row, error, file) from None
    if not isinstance(value, dict):
        raise UserError(f"expected an object with named fields, found {type(value).__name__}")
    return value


def _value_of(line: bytes) -> Any:
    """The JSON value of a line. It may hold NaN and Infinity, which Python writes though JSON has no such numbers.

    They do no harm in a field that nobody reads.

    Raises:
        orjson.JSONDecodeError: the line is not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
        try:
            value = json.loads(line.decode())
            json.dumps(value, ensure_ascii=False).encode()  # `loads` accepts half a surrogate pair, which is not text
        except (ValueError, RecursionError):
            value = None
        if value is None:
            raise
        return value


def plain_texts(block: Block, keys: Sequence[str]) -> list[list[bytes]] | None:
    """For each key the texts of all rows, in UTF-8; None where a row is not a JSON object with these texts.

    This is the fast way for nearly every block of a corpus.
    """
    if block.is_text:
        return None
    try:
        records = _lines_at_once(block) or list(map(_value_of, block.rows()))
        return [[record[key].encode() for record in records] for key in keys]  # only a str has `encode`
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # `parse_row` will say what is wrong


def _lines_at_once(block: Block) -> list[Any] | None:
    """The JSON values of all lines, parsed as one array, which is faster.

    None where a line is not exactly one value, or is nested too deeply.
    """
    if not isinstance(block.content, bytes):
        return None
    lines = block.content if block.content.endswith(b"\n") else block.content + b"\n"
    try:
        values: list[Any] = orjson.loads(b"[%b0]" % lines.replace(b"\n", b",%d," % _AT_LINE_ENDS))
    except orjson.JSONDecodeError:
        return None
    # A line with several values, or a value over several lines, would move these numbers from every second place.
    if len(values) != 2 * block.count + 1 or values[1::2].count(_AT_LINE_ENDS) != block.count:
        return None
    return values[:-1:2]


def iter_blocks(files: Sequence[Path]) -> Iterator[Block]:
    """All rows of all files, in order. Memory does not grow with the size of the files.

    Where a block ends depends only on the files.
    """
    for file in files:
        if has_suffix(file, TABLE_SUFFIXES):
            yield from _row_blocks(file, iter_table_rows(file))
        else:
            yield from _line_blocks(file)


def _line_blocks(file: Path) -> Iterator[Block]:
    """The blocks of a text or JSON file. The first character shows whether a JSON file has an array or lines."""
    is_text = has_suffix(file, _TEXT_SUFFIXES)
    line = 0
    try:
        with open_bytes(file) as stream:
            if not is_text and is_array(stream):
                yield from _row_blocks(file, iter_elements(file, stream))
                return
            if stream.peek(3).startswith(_BYTE_ORDER_MARK):  # type: ignore[attr-defined]
                stream.read(3)
            # Not `readlines`, which is slow and holds Python's lock. Workers split the lines.
            while content := stream.read(_BLOCK_BYTES) + stream.readline():
                # Not `content.count`, which takes three times as long and holds the lock, too.
                ends = int(np.count_nonzero(np.frombuffer(content, np.uint8) == ord("\n")))
                count = ends + (not content.endswith(b"\n"))
                yield Block(str(file), line + 1, count, content, is_text)
                line += count
    except DAMAGED as error:
        raise UserError(f"{file}: cannot be read after line {line}: {error}; the file is damaged") from None


def _row_blocks(file: Path, rows: Iterator[Any]) -> Iterator[Block]:
    block: list[Any] = []
    first, size = 1, 0
    for row in rows:
        block.append(row)
        size += _size(row)
        if len(block) >= _BLOCK_ROWS or size >= _BLOCK_BYTES:
            yield Block(str(file), first, len(block), block)
            first += len(block)
            block, size = [], 0
    if block:
        yield Block(str(file), first, len(block), block)


def _size(row: Any) -> int:
    """Size of a row: bytes of a JSON value, or characters of a record's texts."""
    if isinstance(row, bytes):
        return len(row)
    values = row.values() if isinstance(row, dict) else row
    return sum(len(value) for value in values if isinstance(value, str))


def _json_error(line: bytes, error: orjson.JSONDecodeError, file: str) -> UserError:
    if not line.strip():
        return UserError("empty line, or nothing between two commas of an array; expected a JSON object")
    _decode(line, file)
    ends_early = error.pos >= len(error.doc.rstrip())
    hint = "; the line is truncated, or a value takes several lines, which only an array may do" if ends_early else ""
    return UserError(f"not valid JSON: {error}{hint}")


def _decode(line: bytes, file: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(line, error, file)) from None
