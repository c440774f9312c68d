"""Reading what `torch.save` wrote without torch, one tensor at a time. Its pickle is never executed.

That is an uncompressed zip, a file or a range of one: `<root>/data.pkl` describes nested values in which tensors refer
to storages `<root>/data/<key>`, each a run of raw numbers. Format: torch/serialization.py and
caffe2/serialize/inline_container.h.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.formats.arrays import read_array
from tandem.checkpoints.formats.rows import CheckedRows, Rows, WholeRows
from tandem.checkpoints.formats.torch_names import LOCAL_HEADER, STORAGES, ZIP_MAGIC, contiguous_strides
from tandem.checkpoints.formats.unpickler import unpickle
from tandem.errors import UserError
from tandem.files.real import check_real

# Globals of which only the name is used.
TORCH_NAMES = {
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "strided"),
}
TORCH_GLOBALS = {f"torch.{name}": f"torch.{name}" for name in (*TORCH_NAMES, *STORAGES)}


@dataclass(frozen=True)
class Extent:
    """Where something lies: `length` bytes from byte `start` of a file."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Storage:
    """`numel` consecutive numbers from byte `start` of a file. `crc` is 0 when the writer computed none."""

    path: Path
    dtype: np.dtype
    numel: int
    start: int
    crc: int

    def read(self, first: int, count: int, name: str) -> np.ndarray:
        """`count` numbers from number `first`. A storage that is read whole is checked against its CRC."""
        flat = self.load(first, count, name)
        if count == self.numel:
            self.check(zlib.crc32(flat.view(np.uint8).data), name)
        return flat

    def load(self, first: int, count: int, name: str) -> np.ndarray:
        """The same, unchecked."""
        flat = read_array(self.path, self.dtype, count, self.start + first * self.dtype.itemsize)
        if flat is None:
            raise UserError(f"{self.path}: tensor {name} is cut short")
        return flat

    def check(self, crc: int, name: str) -> None:
        """Raise UserError unless `crc`, that of all its bytes, is the one in the file."""
        if self.crc not in (0, crc):
            raise UserError(f"{self.path}: tensor {name} is damaged: its CRC differs from the one in the file")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor still on disk. `strides` and `offset` count elements of its storage, which tensors may share."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise pickle.UnpicklingError(f"no tensor has shape {self.shape}, strides {self.strides}")
        if self.offset + self._span > self.storage.numel:
            raise pickle.UnpicklingError(f"a tensor of shape {self.shape} exceeds its storage")

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous, in new memory. Errors call it `name`."""
        flat = self.storage.read(self.offset, self._span, name)
        if self._contiguous:
            return flat.reshape(self.shape)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides).copy()

    def rows(self, name: str, shape: tuple[int, ...] | None = None) -> Rows:
        """Its rows, as they are asked for; with `shape`, those of its numbers in another shape.

        A tensor that is not contiguous is read whole.
        """
        if not self._contiguous:
            return WholeRows(self.read(name).reshape(shape or self.shape))
        return _TensorRows(self, name, shape or self.shape)

    @property
    def _span(self) -> int:
        """Elements of the storage from the tensor's first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))

    @property
    def _contiguous(self) -> bool:
        expected = contiguous_strides(self.shape)
        return 0 in self.shape or all(
            size == 1 or stride == contiguous for size, stride, contiguous in zip(self.shape, self.strides, expected)
        )


class _TensorRows(CheckedRows):
    """Rows of a contiguous tensor, in any shape. One that fills its storage is checked against the CRC."""

    def __init__(self, tensor: LazyTensor, name: str, shape: tuple[int, ...]) -> None:
        self._storage, self._offset, self._name = tensor.storage, tensor.offset, name
        self._row, self._crc = math.prod(shape[1:]), 0
        fills = math.prod(shape) == tensor.storage.numel
        super().__init__(shape, tensor.dtype, is_checked=fills and tensor.storage.crc != 0)

    def _load(self, first: int, last: int) -> np.ndarray:
        numbers = self._storage.load(self._offset + first * self._row, (last - first) * self._row, self._name)
        return numbers.reshape(last - first, *self._shape[1:])

    def _begin(self) -> None:
        self._crc = 0

    def _add(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)

    def _check(self) -> None:
        self._storage.check(self._crc, self._name)


def load(path: str | Path) -> Any:
    """What `torch.save` wrote: nested dicts, lists, tuples, numbers, strings, `argparse.Namespace`; `LazyTensor`s.

    No code of the file is run, and no class that it names is imported.

    Raises:
        UserError: the file is missing, truncated, damaged, too old or big-endian, or it asks for a global that is not
            allowed; the global is named.
    """
    path = Path(path)
    check_real(path)
    try:
        return load_extent(Extent(path, 0, path.stat().st_size))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def load_extent(extent: Extent) -> Any:
    """The same for a part of a file that `torch.save` wrote."""
    archive = _Archive(extent)
    order = archive.read("byteorder") if archive.has("byteorder") else b"little"
    if order.strip() != b"little":
        raise UserError(
            f"{extent.path}: byte order {order.decode(errors='replace')!r}; only little-endian files are read"
        )
    known = {
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        **TORCH_GLOBALS,
    }
    return unpickle(archive.read("data.pkl"), extent.path, "data.pkl", known, archive.persistent_load)


class _Archive:
    """The zip entries of what `torch.save` wrote."""

    def __init__(self, extent: Extent) -> None:
        self.path, self._extent = extent.path, extent
        self._entries = self._directory()
        pickles = [name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise UserError(f"{self.path}: a zip file, but not one that torch.save wrote: it holds no data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")

    def has(self, name: str) -> bool:
        return self._root + name in self._entries

    def read(self, name: str) -> bytes:
        entry = self._entry(name)
        storage = Storage(self.path, np.dtype(np.uint8), entry.file_size, self._start(entry), entry.CRC)
        return storage.read(0, entry.file_size, name).tobytes()

    def storage(self, key: str, dtype: np.dtype, numel: int) -> Storage:
        entry = self._entry(f"data/{key}")
        if entry.file_size != numel * dtype.itemsize:
            raise UserError(
                f"{self.path}: damaged: {entry.filename} has {entry.file_size} bytes, "
                f"{numel} numbers of {dtype} need {numel * dtype.itemsize}"
            )
        return Storage(self.path, dtype, numel, self._start(entry), entry.CRC)

    def persistent_load(self, identifier: Any) -> Storage:
        kind, storage_type, key, _location, numel = identifier
        dtype = STORAGES.get(str(storage_type).removeprefix("torch."))
        if kind != "storage" or dtype is None or type(numel) is not int:
            raise pickle.UnpicklingError(f"unknown storage {identifier!r}")
        return self.storage(str(key), dtype, numel)

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with _Window(self._extent) as file:
                magic = file.read(len(ZIP_MAGIC))
                if magic != ZIP_MAGIC:
                    self._refuse(magic)
                archive = zipfile.ZipFile(file)
                return {entry.filename: entry for entry in archive.infolist()}
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path}: truncated or damaged: {error}") from error

    def _refuse(self, magic: bytes) -> None:
        if magic[:1] == pickle.PROTO:
            raise UserError(
                f"{self.path}: written in torch's format from before version 1.6, which cannot be read without "
                f"executing it. Save it again with a recent torch: torch.save(torch.load(path), path)"
            )
        raise UserError(f"{self.path}: not a file that torch.save wrote, or empty")

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise UserError(f"{self.path}: damaged: it holds no {self._root}{name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise UserError(f"{self.path}: {entry.filename} is compressed or encrypted; torch.save stores plainly")
        return entry

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: after its local header, which holds its own length."""
        damaged = UserError(f"{self.path}: truncated or damaged: {entry.filename} is not where it should be")
        if entry.header_offset < 0:
            raise damaged
        with _Window(self._extent) as file:
            file.seek(entry.header_offset)
            header = file.read(LOCAL_HEADER)
        if len(header) != LOCAL_HEADER or not header.startswith(ZIP_MAGIC):
            raise damaged
        name_length, extra_length = struct.unpack_from("<HH", header, LOCAL_HEADER - 4)
        start = entry.header_offset + LOCAL_HEADER + name_length + extra_length
        if start + entry.file_size > self._extent.length:
            raise damaged
        return self._extent.start + start


class _Window(io.RawIOBase):
    """An extent of a file, as a file of its own."""

    def __init__(self, extent: Extent) -> None:
        self._extent, self._position = extent, 0
        self._file = open(extent.path, "rb", buffering=0)  # noqa: SIM115  (closed with this object)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._extent.length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning of the file")
        self._position = base + offset
        return self._position

    def readinto(self, target: Any) -> int:
        count = max(min(len(target), self._extent.length - self._position), 0)
        data = os.pread(self._file.fileno(), count, self._extent.start + self._position)
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _rebuild_tensor(storage: Storage, offset: int, size: Iterable, stride: Iterable, *_autograd: object) -> LazyTensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return LazyTensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor: LazyTensor, *_autograd: object) -> LazyTensor:
    return tensor
