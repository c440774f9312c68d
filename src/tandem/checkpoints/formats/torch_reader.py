"""Reading torch's `.pt` files without torch, one tensor at a time. Their pickle is never executed.

A file is an uncompressed zip: `<root>/data.pkl` describes nested values in which tensors refer to storages
`<root>/data/<key>`, each a run of raw numbers. Format: torch/serialization.py and caffe2/serialize/inline_container.h.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.formats.arrays import read_array
from tandem.checkpoints.formats.torch_names import LOCAL_HEADER, STORAGES, ZIP_MAGIC, contiguous_strides
from tandem.errors import UserError

# Globals of which only the name is used.
TORCH_NAMES = {
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "strided"),
}
# Objects that trainers store next to the weights. They become `Inert`: their code is not loaded.
INERT_PACKAGES = {"megatron", "mindspeed", "mindspeed_llm", "transformer_engine", "numpy"}
INERT_GLOBALS = {
    "_codecs.encode",
    "_io.BytesIO",
    "io.BytesIO",
    "pathlib.PosixPath",
    "signal.SIGINT",
    "signal.SIGTERM",
    "signal.Signals",
    "torch._C.Generator",
    "torch.device",
}
# What the unpickler, or a function that it calls, raises for a damaged pickle.
PICKLE_ERRORS = (
    *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError),
    *(TypeError, ValueError, OverflowError, MemoryError, RecursionError),
)


class Inert:
    """In place of an object whose class is not loaded. It keeps only the name of the class."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


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
        flat = read_array(self.path, self.dtype, count, self.start + first * self.dtype.itemsize)
        if flat is None:
            raise UserError(f"{self.path}: tensor {name} is cut short")
        if count == self.numel and self.crc not in (0, zlib.crc32(flat.view(np.uint8).data)):
            raise UserError(f"{self.path}: tensor {name} is damaged: its CRC differs from the one in the file")
        return flat


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


def load(path: str | Path) -> Any:
    """What `torch.save` wrote: nested dicts, lists, tuples, numbers, strings, `argparse.Namespace`; `LazyTensor`s.

    No code of the file is run, and no class that it names is imported.

    Raises:
        UserError: the file is missing, truncated, damaged, too old or big-endian, or it asks for a global that is not
            allowed; the global is named.
    """
    path = Path(path)
    archive = _Archive(path)
    order = archive.read("byteorder") if archive.has("byteorder") else b"little"
    if order.strip() != b"little":
        raise UserError(f"{path}: byte order {order.decode(errors='replace')!r}; only little-endian files are read")
    try:
        return _Unpickler(archive).load()
    except UserError:
        raise
    except PICKLE_ERRORS as error:
        raise UserError(f"{path}: damaged: data.pkl cannot be read: {error}") from error


class _Archive:
    """The zip entries of a `.pt` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = self._directory()
        pickles = [name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise UserError(f"{path}: a zip file, but not one that torch.save wrote: it holds no data.pkl")
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

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with open(self.path, "rb") as file:
                magic = file.read(len(ZIP_MAGIC))
            if magic != ZIP_MAGIC:
                self._refuse(magic)
            with zipfile.ZipFile(self.path) as archive:
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
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(entry.header_offset)
            header = file.read(LOCAL_HEADER)
        if len(header) != LOCAL_HEADER or not header.startswith(ZIP_MAGIC):
            raise damaged
        name_length, extra_length = struct.unpack_from("<HH", header, LOCAL_HEADER - 4)
        start = entry.header_offset + LOCAL_HEADER + name_length + extra_length
        if start + entry.file_size > size:
            raise damaged
        return start


class _Dict(dict):
    """In place of OrderedDict and defaultdict."""

    def __setstate__(self, state: object) -> None:
        """Attributes of a module's state dict (`_metadata`) are not needed here."""


class _Namespace(argparse.Namespace):
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Unpickler(pickle.Unpickler):
    """Replaces a global by something of this module, or refuses it.

    Every class handed out defines `__setstate__`, so that a pickle cannot set attributes on the class itself.
    """

    def __init__(self, archive: _Archive) -> None:
        data = archive.read("data.pkl")
        _check_opcodes(data)
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._archive = archive
        self._replacements: dict[str, Any] = {
            "argparse.Namespace": _Namespace,
            "types.SimpleNamespace": _Namespace,
            "collections.OrderedDict": _ordered_dict,
            "collections.defaultdict": _default_dict,
            "builtins.set": frozenset,
            "builtins.frozenset": frozenset,
            "builtins.dict": _ordered_dict,
            "builtins.list": list,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch._utils._rebuild_parameter": _rebuild_parameter,
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if full in self._replacements:
            return self._replacements[full]
        if module == "torch" and (name in STORAGES or name in TORCH_NAMES):
            return full
        if module.split(".")[0] in INERT_PACKAGES or full in INERT_GLOBALS:
            return type(name, (Inert,), {"__module__": module})
        raise UserError(
            f"{self._archive.path}: refused: the file asks for {full}, which is neither a tensor nor a plain value. "
            f"No code was run. Save it again with tensors and plain values only"
        )

    def persistent_load(self, identifier: Any) -> Storage:
        kind, storage_type, key, _location, numel = identifier
        dtype = STORAGES.get(str(storage_type).removeprefix("torch."))
        if kind != "storage" or dtype is None or type(numel) is not int:
            raise pickle.UnpicklingError(f"unknown storage {identifier!r}")
        return self._archive.storage(str(key), dtype, numel)


def _check_opcodes(data: bytes) -> None:
    """Raise UnpicklingError when an opcode is cut short, or asks for more memory than the file can need.

    The unpickler grows its memo to any index that the file gives.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise pickle.UnpicklingError(f"memo index {argument} in {len(data)} bytes")


def _ordered_dict() -> dict:
    return _Dict()


def _default_dict(factory: object = None) -> dict:
    return _Dict()


def _rebuild_tensor(storage: Storage, offset: int, size: Iterable, stride: Iterable, *_autograd: object) -> LazyTensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return LazyTensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor: LazyTensor, *_autograd: object) -> LazyTensor:
    return tensor
