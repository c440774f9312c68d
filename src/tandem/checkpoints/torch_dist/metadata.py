"""`.metadata` of a distributed checkpoint of torch: which tensors there are, and where each chunk of them lies.

It is a bare pickle of torch's own classes, which is not executed. A chunk is a box of a global tensor. It is a range of
a `.distcp` file, as `torch.save` writes one tensor. Format: torch/distributed/checkpoint/metadata.py, filesystem.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.formats.torch_names import STORAGES
from tandem.checkpoints.formats.torch_reader import TORCH_GLOBALS, Extent, LazyTensor, load_extent
from tandem.checkpoints.formats.unpickler import Record, unpickle
from tandem.checkpoints.interface import check_shape
from tandem.errors import UserError
from tandem.parallel.slices import Box

METADATA = ".metadata"


class TensorRecord(Record):
    """In place of what describes a tensor."""


CLASSES = "torch.distributed.checkpoint.metadata."
KNOWN = {
    **TORCH_GLOBALS,
    f"{CLASSES}Metadata": Record,
    f"{CLASSES}MetadataIndex": Record,
    f"{CLASSES}TensorStorageMetadata": TensorRecord,
    f"{CLASSES}BytesStorageMetadata": Record,
    f"{CLASSES}ChunkStorageMetadata": Record,
    f"{CLASSES}TensorProperties": Record,
    # where torch before 2.3 has it
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties": Record,
    "torch.distributed.checkpoint.filesystem._StorageInfo": Record,
}
DTYPES = {f"torch.{dtype.name}": dtype for dtype in STORAGES.values()}


@dataclass(frozen=True)
class Chunk:
    """A box of a stored tensor, and where its numbers are."""

    box: Box
    extent: Extent


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint. `dtype` is None when it is one that no weight of a model here has."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    chunks: tuple[Chunk, ...]

    def open(self, chunk: Chunk) -> LazyTensor:
        """The numbers of a chunk, still on disk. Its file records their CRC.

        Raises:
            UserError: they are not what `.metadata` says.
        """
        tensor = load_extent(chunk.extent)
        where = f"{chunk.extent.path}, byte {chunk.extent.start}"
        if not isinstance(tensor, LazyTensor) or tensor.dtype != self.dtype:
            found = tensor.dtype if isinstance(tensor, LazyTensor) else type(tensor).__name__
            raise UserError(f"{where}: {self.name} is {found}; {METADATA} says {self.dtype}")
        check_shape(where, self.name, tensor.shape, tuple(stop - start for start, stop in chunk.box))
        return tensor


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: tensors, and other pickled objects, by name."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Extent]


def read_metadata(folder: Path) -> Contents:
    """What the files of `folder` hold, without reading a tensor.

    Raises:
        UserError: `.metadata` is damaged or names something that is not allowed, or a file is missing or too short.
    """
    path = folder / METADATA
    try:
        metadata = unpickle(path.read_bytes(), path, "its pickle", KNOWN)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        contents = _contents(folder, metadata.state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged: it does not describe a checkpoint: {error!r}") from error
    _check_files(contents)
    return contents


def _contents(folder: Path, state: dict[str, Any]) -> Contents:
    places = {_key(index.state): _extent(folder, info.state) for index, info in state["storage_data"].items()}
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Extent] = {}
    for name, record in state["state_dict_metadata"].items():
        if isinstance(record, TensorRecord):
            tensors[name] = _tensor(name, record.state, places)
        elif (name, None) in places:
            objects[name] = places[name, None]
    return Contents(tensors, objects)


def _tensor(name: str, state: dict[str, Any], places: dict[tuple[str, tuple[int, ...] | None], Extent]) -> StoredTensor:
    shape = _sizes(state["size"])
    chunks = []
    for chunk in state["chunks"]:
        offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
        box = tuple((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        if len(box) != len(shape) or any(stop > size for (_, stop), size in zip(box, shape)):
            raise ValueError(f"a chunk {box} of {name}, whose shape is {shape}")
        if math.prod(sizes):  # a rank without rows writes none
            chunks.append(Chunk(box, places[name, offsets]))
    properties = state["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    return StoredTensor(name, shape, DTYPES.get(dtype), tuple(chunks))


def _key(index: dict[str, Any]) -> tuple[str, tuple[int, ...] | None]:
    offset = index.get("offset")
    return index["fqn"], None if offset is None else _sizes(offset)


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    return sizes


def _extent(folder: Path, info: dict[str, Any]) -> Extent:
    if info.get("transform_descriptors"):
        raise UserError(
            f"{folder / METADATA}: its tensors were written through {', '.join(info['transform_descriptors'])}, which "
            f"is not read. Save the checkpoint again without extensions"
        )
    name, start, length = info["relative_path"], *_sizes((info["offset"], info["length"]))
    if Path(name).name != name:
        raise ValueError(f"a file named {name!r}")
    return Extent(folder / name, start, length)


def _check_files(contents: Contents) -> None:
    """Raise UserError when files are missing or shorter than `.metadata` says."""
    ends: dict[Path, int] = {}
    chunks = [chunk.extent for tensor in contents.tensors.values() for chunk in tensor.chunks]
    for extent in (*chunks, *contents.objects.values()):
        ends[extent.path] = max(ends.get(extent.path, 0), extent.start + extent.length)
    folder = next(iter(ends), Path()).parent
    if missing := sorted(path.name for path in ends if not path.is_file()):
        raise UserError(
            f"{folder}: files are missing: {', '.join(missing)}. {METADATA} names {len(ends)}: each machine of a job "
            f"without a shared disk wrote its own; copy all of them into this folder"
        )
    for path, end in ends.items():
        if (size := path.stat().st_size) < end:
            raise UserError(f"{path}: cut short: it has {size} bytes; {METADATA} says {end}")
