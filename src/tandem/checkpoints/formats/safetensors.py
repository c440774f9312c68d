"""One `.safetensors` file: tensors are read one by one, and written one by one, in an order fixed beforehand.

The `safetensors` library writes all tensors at once, from memory; this module holds one tensor at a time.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tandem.checkpoints.formats.arrays import read_box
from tandem.checkpoints.interface import DTYPES, dtype_name
from tandem.errors import UserError
from tandem.files.large_file import CHUNK, LargeFile
from tandem.files.real import check_real
from tandem.parallel.slices import Box, Part

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {code: name for name, code in CODES.items()}
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class Entry:
    """A tensor's place in a file; `start` counts bytes from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """Read access to one file. The header is read and checked once.

    Raises:
        UserError: the file is missing, truncated, or not safetensors.
    """

    partial = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries = self._read_header()

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, or a box of it, in new memory."""
        entry = self.entries[name]
        box = box or Part.whole(entry.shape).boxes[0]
        values = read_box(self.path, entry.dtype, entry.shape, entry.start, box)
        if values is None:
            raise UserError(f"{self.path}: tensor {name} is cut short")
        return values

    def _read_header(self) -> dict[str, Entry]:
        check_real(self.path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(MAX_HEADER, size - 8):
                    raise UserError(f"{self.path}: truncated, or not a safetensors file ({size} bytes)")
                header = json.loads(file.read(length))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path}: the header is not valid JSON; not a safetensors file") from error
        if not isinstance(header, dict):
            raise UserError(f"{self.path}: the header is not a JSON object; not a safetensors file")
        header.pop("__metadata__", None)
        return {name: self._entry(name, item, 8 + length, size) for name, item in header.items()}

    def _entry(self, name: str, item: Any, base: int, file_size: int) -> Entry:
        try:
            code, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.path}: damaged: the header holds {item!r} for tensor {name}") from None
        if code not in NAMES:
            raise UserError(f"{self.path}: tensor {name} has dtype {code}; supported: {', '.join(NAMES)}")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise UserError(f"{self.path}: damaged: the header holds {item!r} for tensor {name}")
        entry = Entry(DTYPES[NAMES[code]], shape, base + start)
        if stop - start != entry.nbytes or base + stop > file_size:
            raise UserError(
                f"{self.path}: tensor {name} should hold {entry.nbytes} bytes from byte {entry.start}; "
                f"the file has {file_size} bytes: it is truncated or damaged"
            )
        return entry


class SafetensorsWriter:
    """Write tensors in the order of `entries`, each whole or in blocks of rows.

    The caller must write every entry, in order, and then call `close()`. `chunk` is that of `LargeFile`.
    """

    def __init__(
        self,
        path: str | Path,
        entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.path = Path(path)
        self._pending = [(name, np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in entries.items()]
        self._next = self._rows = 0  # the number of the entry that comes next, and how many of its rows are written
        self._file = LargeFile(self.path, chunk)
        self._file.write(self._header(dict(metadata or {})))

    def write(self, name: str, rows: np.ndarray) -> bool:
        """Append the next rows of `name`. Returns whether it is complete now."""
        expected, dtype, shape = self._pending[self._next]
        assert name == expected, f"{self.path}: {name} written where {expected} was announced"
        self._rows += len(rows)
        fits = rows.shape[1:] == shape[1:] and self._rows <= shape[0]
        assert fits, f"{self.path}: {name} is given rows {rows.shape} up to {self._rows}, announced {shape}"
        self._file.write(np.ascontiguousarray(rows, dtype=dtype).reshape(-1).view(np.uint8).data)
        if complete := self._rows == shape[0]:
            self._next, self._rows = self._next + 1, 0
        return complete

    def close(self) -> None:
        assert self._next == len(self._pending), f"{self.path}: {self._pending[self._next][0]} was never written"
        self._file.close()

    def abort(self) -> None:
        self._file.abort()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _header(self, metadata: dict[str, str]) -> bytes:
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, dtype, shape in self._pending:
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype_name(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        return len(text).to_bytes(8, "little") + text
