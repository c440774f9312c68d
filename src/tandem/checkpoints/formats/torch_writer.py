"""Writing files that `torch.load` reads, one tensor at a time, without torch."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from tandem.checkpoints.formats.torch_names import LOCAL_HEADER, STORAGE_NAMES, contiguous_strides
from tandem.files.large_file import CHUNK, LargeFile

ALIGNMENT = 64  # torch's: tensors begin at a multiple of this
ZIP64_FROM = 1 << 30  # entries from this size get 64-bit sizes; zip needs them from 4 GB
ZIP64_EXTRA = 20  # bytes that 64-bit sizes add to a local header


@dataclass(frozen=True, eq=False)
class PendingTensor:
    """In the content of a file, the place of a tensor that is written later."""

    dtype: np.dtype
    shape: tuple[int, ...]


class TorchFileWriter:
    """Write a file that `torch.load` reads, also with `mmap=True` and `weights_only=True`.

    `content` is made of dict, OrderedDict, `argparse.Namespace`, list, tuple, str, int, float, bool, None and
    `PendingTensor`. The caller writes every pending tensor, in any order, each whole or in blocks of rows, and then
    calls `close()`. A file is fastest to read when tensors are written in their order in `content`. `chunk` is that of
    `LargeFile`.
    """

    def __init__(self, path: str | Path, content: Any, chunk: int = CHUNK) -> None:
        self.path = Path(path)
        emitter = _Emitter()
        description = emitter.pickle(content)
        self._keys = {tensor: key for key, tensor in enumerate(emitter.tensors)}
        self._written: set[PendingTensor] = set()
        self._entry: IO[bytes] | None = None  # of the tensor that is being written
        self._remaining = 0  # bytes of it
        self._file = LargeFile(self.path, chunk)
        self._zip = zipfile.ZipFile(self._file, "w")
        self._add("data.pkl", description)
        self._add(".format_version", b"1")
        self._add(".storage_alignment", str(ALIGNMENT).encode())
        self._add("byteorder", b"little")

    def write(self, pending: PendingTensor, rows: np.ndarray) -> None:
        """Append the next rows of a tensor. Another tensor may begin when it is complete."""
        assert rows.shape[1:] == pending.shape[1:], f"{self.path}: rows {rows.shape}, announced {pending.shape}"
        self.write_numbers(pending, rows)

    def write_numbers(self, pending: PendingTensor, rows: np.ndarray) -> None:
        """Append the next numbers of a tensor, in an array of any shape."""
        assert pending not in self._written, f"{self.path}: a tensor was written twice"
        flat = np.ascontiguousarray(rows, dtype=pending.dtype).reshape(-1)
        if self._entry is None:
            size = math.prod(pending.shape) * pending.dtype.itemsize
            self._entry = self._open(f"data/{self._keys[pending]}", size)
            self._remaining = size
        self._entry.write(flat.view(np.uint8).data)
        self._remaining -= flat.nbytes
        assert self._remaining >= 0, f"{self.path}: too many rows for {pending.shape}"
        if not self._remaining:
            self._entry.close()
            self._entry = None
            self._written.add(pending)

    def close(self) -> None:
        assert len(self._written) == len(self._keys), f"{self.path}: not every tensor was written"
        self._add("version", b"3\n")
        self._zip.close()
        self._file.close()

    def abort(self) -> None:
        """Stop writing. The file is not whole."""
        with contextlib.suppress(OSError):  # the write that failed has reported a full disk
            if self._entry is not None:
                self._entry.close()
            self._zip.close()
        self._file.abort()

    def __enter__(self) -> TorchFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _add(self, name: str, data: bytes) -> None:
        with self._open(name, len(data)) as file:
            file.write(data)

    def _open(self, name: str, size: int) -> IO[bytes]:
        entry = zipfile.ZipInfo(f"{self.path.stem}/{name}")
        entry.file_size = size
        zip64 = size >= ZIP64_FROM
        entry.extra = self._padding(entry.filename, zip64)
        return self._zip.open(entry, "w", force_zip64=zip64)

    def _padding(self, name: str, zip64: bool) -> bytes:
        """An extra field, as torch writes it. After it the entry's bytes begin at a multiple of ALIGNMENT."""
        header = LOCAL_HEADER + len(name.encode()) + (ZIP64_EXTRA if zip64 else 0) + 4
        length = -(self._file.tell() + header) % ALIGNMENT
        return struct.pack("<2sH", b"FB", length) + b"Z" * length


class _Emitter:
    """Writes pickle protocol 2, the only one that torch's `weights_only` reads. Names classes, and imports none."""

    def __init__(self) -> None:
        self.tensors: list[PendingTensor] = []
        self._out = io.BytesIO()
        self._emitters: dict[type, Callable[[Any], None]] = {
            bool: lambda value: self._write(pickle.NEWTRUE if value else pickle.NEWFALSE),
            int: self._int,
            float: lambda value: self._write(pickle.BINFLOAT, struct.pack(">d", value)),
            str: self._str,
            type(None): lambda value: self._write(pickle.NONE),
            tuple: self._tuple,
            list: self._list,
            dict: self._dict,
            OrderedDict: self._ordered_dict,
            argparse.Namespace: self._namespace,
            PendingTensor: self._tensor,
        }

    def pickle(self, content: Any) -> bytes:
        self._write(pickle.PROTO, b"\x02")
        self._any(content)
        self._write(pickle.STOP)
        return self._out.getvalue()

    def _write(self, *parts: bytes) -> None:
        self._out.writelines(parts)

    def _any(self, value: Any) -> None:
        emit = self._emitters.get(type(value))
        assert emit is not None, f"a {type(value).__name__} cannot be stored in a torch file"
        emit(value)

    def _int(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self._write(pickle.BININT, struct.pack("<i", value))
        else:
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._write(pickle.LONG1, bytes([len(digits)]), digits)

    def _str(self, value: str) -> None:
        encoded = value.encode("utf-8")
        self._write(pickle.BINUNICODE, struct.pack("<I", len(encoded)), encoded)

    def _tuple(self, value: tuple) -> None:
        self._write(pickle.MARK)
        for item in value:
            self._any(item)
        self._write(pickle.TUPLE)

    def _list(self, value: list) -> None:
        self._write(pickle.EMPTY_LIST, pickle.MARK)
        for item in value:
            self._any(item)
        self._write(pickle.APPENDS)

    def _dict(self, value: dict) -> None:
        self._write(pickle.EMPTY_DICT)
        self._items(value)

    def _ordered_dict(self, value: OrderedDict) -> None:
        self._global("collections", "OrderedDict")
        self._write(pickle.EMPTY_TUPLE, pickle.REDUCE)
        self._items(value)

    def _items(self, value: dict) -> None:
        self._write(pickle.MARK)
        for key, item in value.items():
            self._any(key)
            self._any(item)
        self._write(pickle.SETITEMS)

    def _namespace(self, value: argparse.Namespace) -> None:
        self._global("argparse", "Namespace")
        self._write(pickle.EMPTY_TUPLE, pickle.NEWOBJ)
        self._dict(vars(value))
        self._write(pickle.BUILD)

    def _tensor(self, value: PendingTensor) -> None:
        key = str(len(self.tensors))
        self.tensors.append(value)
        self._global("torch._utils", "_rebuild_tensor_v2")
        self._write(pickle.MARK)
        self._storage(key, value)
        storage_offset, requires_grad, backward_hooks = 0, False, OrderedDict[str, Any]()
        for argument in (storage_offset, value.shape, contiguous_strides(value.shape), requires_grad, backward_hooks):
            self._any(argument)
        self._write(pickle.TUPLE, pickle.REDUCE)

    def _storage(self, key: str, value: PendingTensor) -> None:
        self._write(pickle.MARK)
        self._str("storage")
        self._global("torch", STORAGE_NAMES[value.dtype.name])
        for item in (key, "cpu", math.prod(value.shape)):
            self._any(item)
        self._write(pickle.TUPLE, pickle.BINPERSID)

    def _global(self, module: str, name: str) -> None:
        self._write(pickle.GLOBAL, f"{module}\n{name}\n".encode())
