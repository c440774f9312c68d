"""Records from files: JSON arrays, JSON lines (plain, gzip, zstandard) and Parquet, one row at a time."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from tandem.errors import UserError

_JSON_SUFFIXES = (".json", ".jsonl")
_COMPRESSIONS = ("", ".gz", ".zst")
SUFFIXES = (*(json + compression for json in _JSON_SUFFIXES for compression in _COMPRESSIONS), ".parquet")
_PARQUET_BATCH = 1024  # rows in memory at a time


@dataclass(frozen=True)
class Row:
    """One record, not yet looked at.

    Attributes:
        place: `file:line` of a JSON line, `file:row n` of anything else; both count from 1.
        content: the line's bytes, or the value that the file format gave.
    """

    place: str
    content: Any

    @property
    def size(self) -> int:
        """Bytes of the line, or characters of the texts."""
        if isinstance(self.content, bytes):
            return len(self.content)
        values = self.content.values() if isinstance(self.content, dict) else [self.content]
        return sum(len(value) for value in values if isinstance(value, str))

    def parse(self) -> dict[str, Any]:
        """The record.

        Raises:
            UserError: the line is empty, truncated, not UTF-8 or not JSON, or the record is not an object.
        """
        value = self._parse_line(self.content) if isinstance(self.content, bytes) else self.content
        if not isinstance(value, dict):
            raise UserError(f"{self.place}: expected an object with named fields, found {type(value).__name__}")
        return value

    def _parse_line(self, line: bytes) -> Any:
        if not line.strip():
            raise UserError(f"{self.place}: empty line; expected one JSON object per line")
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError as error:
            reason = f"not valid JSON, perhaps a truncated line: {error}"
        try:
            line.decode()
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: byte {line[error.start]:#04x} at position {error.start + 1}; convert the file"
        raise UserError(f"{self.place}: {reason}")


def expand_input(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files behind `inputs`, each a file, a directory (its data files, by name) or a glob pattern."""
    files: list[Path] = []
    for entry in inputs:
        given, path = os.fspath(entry), Path(entry)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(given, recursive=True) if os.path.isfile(name))
        if not found:
            raise UserError(
                f"input {given!r}: no such file, and no directory or pattern with {', '.join(SUFFIXES)} files"
            )
        files += found
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    return files


def iter_rows(files: Sequence[Path]) -> Iterator[Row]:
    """All rows of all files, in order. Memory does not grow with the size of JSON lines and Parquet files; a JSON
    array is read whole."""
    for file in files:
        if file.name.endswith(".parquet"):
            yield from _parquet_rows(file)
        else:
            yield from _json_rows(file)


def _json_rows(file: Path) -> Iterator[Row]:
    """Both `.json` and `.jsonl` may hold an array or lines: the first character tells which."""
    line = 0
    try:
        with _open(file) as stream:
            if _is_array(stream):
                yield from _array_rows(file, stream)
                return
            for line, content in enumerate(stream, start=1):
                yield Row(f"{file}:{line}", content.rstrip(b"\r\n"))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read beyond line {line}: {error}; the file is damaged") from None


def _array_rows(file: Path, stream: BinaryIO) -> Iterator[Row]:
    try:
        values = orjson.loads(stream.read())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not a valid JSON array, perhaps truncated: {error}") from None
    for number, value in enumerate(values, start=1):
        yield Row(f"{file}:row {number}", value)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow.parquet  # here, because that is slow

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(_PARQUET_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}:row {number}", value)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read beyond row {number}: {error}; the file is damaged") from None


def _open(file: Path) -> BinaryIO:
    if file.name.endswith(".gz"):
        return gzip.open(file)  # type: ignore[return-value]
    if file.name.endswith(".zst"):
        return _open_zstandard(file)
    return file.open("rb")


def _open_zstandard(file: Path) -> BinaryIO:
    # Not the zstandard package: it takes a truncated file for a short one. Imported here, because that is slow.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 1 << 20)


def _is_array(stream: BinaryIO) -> bool:
    """Whether the first character other than white space is `[`; the stream stays where it is."""
    start = stream.peek(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n")  # type: ignore[attr-defined]
    return start.startswith(b"[")
