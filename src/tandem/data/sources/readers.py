"""Records from files, a block of rows at a time: JSON, JSON lines, plain text, CSV, Parquet and Arrow."""

from __future__ import annotations

import glob
import gzip
import io
import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from tandem.data.kinds import REJECTS_SUFFIX
from tandem.data.record import is_record
from tandem.data.sources.json_array import is_array, iter_elements
from tandem.data.sources.tables import TABLE_SUFFIXES, UnevenRow, iter_table_rows
from tandem.errors import UserError

_COMPRESSIONS = ("", ".gz", ".zst")
_TEXT_SUFFIXES = tuple(".txt" + compression for compression in _COMPRESSIONS)
_JSON_SUFFIXES = tuple(json + compression for json in (".json", ".jsonl") for compression in _COMPRESSIONS)
SUFFIXES = (*_JSON_SUFFIXES, *_TEXT_SUFFIXES, *TABLE_SUFFIXES)
_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1024  # a block ends at either
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_AT_LINE_ENDS = secrets.randbits(62)  # what no file can be made to hold


@dataclass(frozen=True)
class Block:
    """Rows that lie together in a file, not yet looked at.

    Attributes:
        first: number of the first row, from 1.
        count: of rows; when `content` has more, the first ones.
        content: lines end to end; or per row the bytes of a JSON value, or the record itself.
        is_text: a line is a text and not JSON.
        source: which of several sources the file belongs to.
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

    def place(self, index: int) -> str:
        """`file:line`, or `file:row n` where a row is not a line."""
        return f"{self.file}:{'' if isinstance(self.content, bytes) else 'row '}{self.first + index}"


class _TextLine(bytes):
    """A line of a text file: a record whose only field is `text`."""


def parse_row(row: Any) -> dict[str, Any]:
    """The record of a row.

    Raises:
        UserError: without the place: the line is empty, truncated, not UTF-8 or not JSON, or not an object, or a row
            has not as many fields as its table.
    """
    if isinstance(row, _TextLine):
        return {"text": _decode(row.rstrip(b"\r\n"))}
    if isinstance(row, UnevenRow):
        raise UserError(row.reason)
    try:
        value = orjson.loads(row) if isinstance(row, bytes) else row
    except orjson.JSONDecodeError as error:
        raise _json_error(row, error) from None
    if not isinstance(value, dict):
        raise UserError(f"expected an object with named fields, found {type(value).__name__}")
    return value


def plain_texts(block: Block, keys: Sequence[str]) -> list[list[bytes]] | None:
    """Of each key the texts of all rows in UTF-8, where each row is the JSON of an object with such texts; else None.
    Nearly every block of a corpus is such a one, and a comprehension is all that it costs."""
    if block.is_text:
        return None
    try:
        records = _lines_at_once(block) or [orjson.loads(row) for row in block.rows()]
        return [[record[key].encode() for record in records] for key in keys]  # only a str has `encode`
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # whatever it is, `parse_row` says what


def _lines_at_once(block: Block) -> list[Any] | None:
    """The JSON values of all lines, read as one array, which takes less time; None where they are not one value each,
    or are too deep within an array."""
    if not isinstance(block.content, bytes):
        return None
    lines = block.content if block.content.endswith(b"\n") else block.content + b"\n"
    try:
        values: list[Any] = orjson.loads(b"[%b0]" % lines.replace(b"\n", b",%d," % _AT_LINE_ENDS))
    except orjson.JSONDecodeError:
        return None
    # A line that held several values, or a value that went on over lines, would bring the numbers out of their places.
    if len(values) != 2 * block.count + 1 or values[1::2].count(_AT_LINE_ENDS) != block.count:
        return None
    return values[:-1:2]


def expand_input(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files behind `inputs`, each a file, a directory (its data files, by name) or a glob pattern."""
    files: list[Path] = []
    for entry in inputs:
        given, path = os.fspath(entry), Path(entry)
        if path.is_dir():
            named = (file for file in path.iterdir() if file.name.endswith(SUFFIXES) and not file.is_dir())
            found = sorted(file for file in named if not _is_output(file))
        elif path.is_file():
            found = [path]
        else:
            matches = sorted(Path(name) for name in glob.glob(given, recursive=True) if os.path.isfile(name))
            found = [file for file in matches if not _is_output(file)]
        if not found:
            raise UserError(
                f"input {given!r}: no such file, and no directory or pattern with {', '.join(SUFFIXES)} files"
            )
        files += found
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: a link to {os.readlink(file)}, which is not there")
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    return files


def _is_output(file: Path) -> bool:
    """What an earlier run of ours left beside its input: data, their record, or rows that it rejected."""
    return (
        file.suffix in (".bin", ".idx")
        or file.name.endswith(REJECTS_SUFFIX)
        or (file.suffix == ".json" and file.is_file() and is_record(file))
    )


def iter_blocks(files: Sequence[Path]) -> Iterator[Block]:
    """All rows of all files, in order; memory does not grow with their size. Where a block ends depends on the files
    alone."""
    for file in files:
        if file.name.endswith(TABLE_SUFFIXES):
            yield from _row_blocks(file, iter_table_rows(file))
        else:
            yield from _line_blocks(file)


def _line_blocks(file: Path) -> Iterator[Block]:
    """Both `.json` and `.jsonl` may hold an array or lines: the first character tells which."""
    is_text = file.name.endswith(_TEXT_SUFFIXES)
    line = 0
    try:
        with _open(file) as stream:
            if not is_text and is_array(stream):
                yield from _row_blocks(file, iter_elements(file, stream))
                return
            if stream.peek(3).startswith(_BYTE_ORDER_MARK):  # type: ignore[attr-defined]
                stream.read(3)
            # Not `readlines`: it is slow, and holds Python's lock; workers split the lines.
            while content := stream.read(_BLOCK_BYTES) + stream.readline():
                # Not `content.count`, which takes thrice the time and holds the lock, too.
                ends = int(np.count_nonzero(np.frombuffer(content, np.uint8) == ord("\n")))
                count = ends + (not content.endswith(b"\n"))
                yield Block(str(file), line + 1, count, content, is_text)
                line += count
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read beyond line {line}: {error}; the file is damaged") from None


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
    """Bytes of a JSON value, or characters of the texts of a record."""
    if isinstance(row, bytes):
        return len(row)
    values = row.values() if isinstance(row, dict) else row
    return sum(len(value) for value in values if isinstance(value, str))


def _json_error(line: bytes, error: orjson.JSONDecodeError) -> UserError:
    if not line.strip():
        return UserError("empty line, or nothing between two commas of an array; expected a JSON object")
    _decode(line)
    ends_early = error.pos >= len(error.doc.rstrip())
    hint = "; the line is truncated, or a value goes on over several lines, outside an array" if ends_early else ""
    return UserError(f"not valid JSON: {error}{hint}")


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8: byte {line[error.start]:#04x} at position {error.start + 1}; convert the file"
        ) from None


def _open(file: Path) -> BinaryIO:
    if file.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(file), 1 << 20)
    if file.name.endswith(".zst"):
        return _open_zstandard(file)
    return file.open("rb")


def _open_zstandard(file: Path) -> BinaryIO:
    # Not the zstandard package: it takes a truncated file for a short one. Imported here, because that is slow.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 1 << 20)
