"""The files of a native checkpoint: their names, their content, and writing one iteration of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.adapters.base import BaseRecord
from tandem.checkpoints.folders import COMPANIONS
from tandem.checkpoints.formats.arrays import row_blocks
from tandem.checkpoints.formats.safetensors import SafetensorsWriter
from tandem.checkpoints.hf.companions import original_dtype, write_companions
from tandem.checkpoints.interface import DTYPES, Companions, TensorKind, dtype_name
from tandem.errors import UserError
from tandem.files.digests import Digest, Hashing
from tandem.files.large_file import chunk_for
from tandem.models.config import ModelConfig
from tandem.models.tensors import is_trained, tensor_table
from tandem.parallel.layout import Layout, Shard

FORMAT = "tandem"
VERSION = 1
INDEX = "index.json"


def key_of(name: str, kind: TensorKind) -> str:
    """A tensor's name inside a file.

    >>> key_of("embedding.word_embeddings.weight", "exp_avg")
    'exp_avg.embedding.word_embeddings.weight'
    """
    return name if kind == "model" else f"{kind}.{name}"


def stored_names(config: ModelConfig, kind: TensorKind, *, adapters_only: bool) -> list[str]:
    """The tensors of a kind that a checkpoint holds.

    The optimizer's are those of what is trained. With `adapters_only`, the weights are in the adapters' base.
    """
    rest = kind == "model" and not adapters_only
    return [name for name, spec in tensor_table(config).items() if rest or is_trained(config, spec)]


def slice_bytes(tensor: np.ndarray) -> memoryview:
    return tensor.reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class PlannedSlice:
    """A slice that will be written: a part of a tensor, and the file for it."""

    file: str
    kind: TensorKind
    shard: Shard

    @property
    def key(self) -> str:
        return key_of(self.shard.spec.name, self.kind)


class SliceFiles:
    """The files that one process writes, and their entries in the index. A file is made when its first slice comes."""

    def __init__(self, work: Path, plan: Sequence[PlannedSlice], dtypes: Mapping[TensorKind, str]) -> None:
        self._work = work
        self._entries: dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]] = {}
        for item in plan:
            self._entries.setdefault(item.file, {})[item.key] = (DTYPES[dtypes[item.kind]], item.shard.shape)
        self._writers: dict[str, SafetensorsWriter] = {}
        self._hashing = Hashing()
        self._digests: dict[PlannedSlice, Digest] = {}
        self.index: dict[str, dict[str, Any]] = {}

    @property
    def keys(self) -> set[str]:
        """The keys of the tensors that were written, whole or in part."""
        return {item.key for item in self._digests}

    def write(self, item: PlannedSlice, rows: np.ndarray, dtype: np.dtype) -> None:
        """Append the next rows of a slice. The rows must not change before `close`."""
        if item.file not in self._writers:
            self._writers[item.file] = SafetensorsWriter(
                self._work / item.file, self._entries[item.file], chunk=chunk_for(len(self._entries))
            )
        if item not in self._digests:
            self._digests[item] = self._hashing.digest()
        digest = self._digests[item]
        rows = np.ascontiguousarray(rows, dtype=dtype)
        for first, last in row_blocks(rows.shape, dtype):
            self._hashing.update(digest, slice_bytes(rows[first:last]))
            self._writers[item.file].write(item.key, rows[first:last])

    def close(self) -> None:
        """Finish: all files are whole and on the disk, and the index has an entry for every slice."""
        assert self._writers.keys() == self._entries.keys(), "a file was announced and nothing written to it"
        for writer in self._writers.values():
            writer.close()
        self._hashing.close()
        for item, digest in self._digests.items():
            self._enter(item, digest.hexdigest())

    def abort(self) -> None:
        self._hashing.close()
        for writer in self._writers.values():
            writer.abort()

    def _enter(self, item: PlannedSlice, digest: str) -> None:
        spec = item.shard.spec
        dtype, _ = self._entries[item.file][item.key]
        entry = self.index.setdefault(
            item.key,
            {"shape": spec.shape, "dtype": dtype_name(dtype), "stacked_dim": spec.split.dim or 0, "slices": []},
        )
        entry["slices"].append({"file": item.file, "boxes": item.shard.part.boxes, "sha256": digest})


@dataclass(frozen=True)
class IterationWriter:
    """Writes what a native checkpoint holds besides its slices: index, config, companions and documents.

    Attributes:
        base: the weights of adapters, when the checkpoint holds only these.
    """

    config: ModelConfig
    layout: Layout
    dtypes: Mapping[TensorKind, str]
    number: int
    companions: Companions
    documents: Mapping[str, str]
    base: BaseRecord | None = None

    def names(self, kind: TensorKind) -> list[str]:
        """The tensors of a kind that the checkpoint holds."""
        return stored_names(self.config, kind, adapters_only=self.base is not None)

    @property
    def nbytes(self) -> int:
        table = tensor_table(self.config)
        return sum(
            table[name].numel * DTYPES[dtype].itemsize
            for kind, dtype in self.dtypes.items()
            for name in self.names(kind)
        )

    def check_complete(self, where: Path, keys: Collection[str]) -> None:
        missing = [
            key_of(name, kind) for kind in self.dtypes for name in self.names(kind) if key_of(name, kind) not in keys
        ]
        if missing:
            raise UserError(f"{where}: {missing[0]} was never written ({len(missing)} tensors missing)")

    def describe(self, work: Path, index: Mapping[str, Any], *, elsewhere: bool) -> None:
        """Write everything except the slices into `work`. `elsewhere`: other machines hold some of the files."""
        dtype = original_dtype(self.companions, self.dtypes["model"])
        write_companions(work / COMPANIONS, self.companions, self.config, dtype)
        for name, text in self.documents.items():
            (work / name).write_text(text, encoding="utf-8")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "iteration": self.number,
            "model": self.config.to_dict(),
            "layout": asdict(self.layout),
            "kinds": dict(self.dtypes),
            **({"elsewhere": True} if elsewhere else {}),
            **({"base": asdict(self.base)} if self.base else {}),
            "tensors": index,
        }
        (work / INDEX).write_text(json.dumps(content) + "\n", encoding="utf-8")


def in_words(error: BaseException | None) -> str | None:
    """An error in words, so that ranks can send it to each other; None for None.

    >>> in_words(KeyError("model"))
    "KeyError: 'model'"
    """
    if error is None:
        return None
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
