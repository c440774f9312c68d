"""Rows of table files: CSV, TSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.data.sources.compressed import COMPRESSIONS, DAMAGED, has_suffix, open_bytes
from tandem.errors import UserError
from tandem.files.text import not_utf8

# The end of a name -> what separates values.
_SEPARATORS = {
    f"{name}{compression}": sign for name, sign in ((".csv", ","), (".tsv", "\t")) for compression in COMPRESSIONS
}
TABLE_SUFFIXES = (*_SEPARATORS, ".parquet", ".arrow")
_BATCH_ROWS = 1024  # in memory at a time


class UnevenRow(list[str]):
    """A CSV row with more or fewer values than the header has names; `reason` says so."""

    reason: str


def iter_table_rows(file: Path) -> Iterator[dict[str, Any] | UnevenRow]:
    """The records of a table file, one at a time. Values of CSV and TSV files are texts; blank lines are skipped.

    Raises:
        UserError: the file is damaged.
    """
    for suffix, separator in _SEPARATORS.items():
        if has_suffix(file, (suffix,)):
            return _csv_rows(file, separator)
    return _arrow_rows(file)


def _csv_rows(file: Path, separator: str) -> Iterator[dict[str, Any] | UnevenRow]:
    csv.field_size_limit(sys.maxsize)
    line = 0
    try:
        with io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True, delimiter=separator)
            rows = filter(None, reader)
            header = next(rows, [])
            if repeated := [name for number, name in enumerate(header) if name in header[:number]]:
                raise UserError(
                    f"{file}: the header names {', '.join(map(repr, repeated))} more than once; rename a column"
                )
            for values in rows:
                line = reader.line_num
                if len(values) == len(header):
                    yield dict(zip(header, values))
                    continue
                uneven = UnevenRow(values)
                uneven.reason = f"line {line}: {len(values)} fields, but the header names {len(header)}: {header}"
                yield uneven
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not valid CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: after line {reader.line_num}: {not_utf8(error.object, error, file)}") from None
    except DAMAGED as error:
        raise UserError(f"{file}: cannot be read after line {line}: {error}; the file is damaged") from None


def _arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow  # here, because that is slow

    number = 0
    try:
        for batch in _parquet_batches(file) if has_suffix(file, (".parquet",)) else _arrow_batches(file):
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(begin, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield {column: _without_nulls(value) for column, value in row.items()}
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8: byte {error.object[error.start]:#04x} after row {number}; "
            f"write the file again with texts in UTF-8"
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read after row {number}: {error}; the file is damaged") from None


def _without_nulls(value: Any) -> Any:
    """Leave out fields that are null. A table gives each object all fields of its column; missing ones are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _parquet_batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        yield from table.iter_batches(_BATCH_ROWS)


def _arrow_batches(file: Path) -> Iterator[Any]:
    """The batches of an Arrow file. The form with an index begins with ARROW1; the other form is a stream."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(source)
            yield from (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
