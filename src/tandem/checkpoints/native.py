"""The native checkpoint: Megatron's folders with safetensors, and an index that any layout can be read from.

    latest_checkpointed_iteration.txt      the newest whole iteration; written last
    iter_0000010/
        index.json                         global name -> shape, dtype, slices (file, boxes, sha256); config, layout
        mp_rank_00[_000]/model.safetensors       a rank's slices of the weights
        mp_rank_00[_000]/optimizer.safetensors   its slices of master weights and Adam's moments
        hf/                                config.json and tokenizer files, for export
        *.json, *.yaml                     documents of the trainer: counters, data position, settings

Names in the files are global. Both backends write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.folders import COMPANIONS, TRACKER, find_iteration, iteration_folder, rank_folder
from tandem.checkpoints.hf import companions_of, write_companions
from tandem.checkpoints.interface import DTYPES, Companions, Kind, TensorSource, check_names, check_shape, dtype_name
from tandem.checkpoints.publish import Publication, check_free_space, write_text_atomically
from tandem.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout, Shard, shards
from tandem.parallel.slices import Part, cut, paste

FORMAT = "tandem"
VERSION = 1
INDEX = "index.json"
PROMPT_FILE = "prompt.json"  # the template that the weights were fine-tuned on, as the data's record gave it


def key_of(name: str, kind: Kind) -> str:
    """A tensor's name inside a file."""
    return name if kind == "model" else f"{kind}.{name}"


def sha256(tensor: np.ndarray) -> str:
    """Of the bytes of a contiguous tensor."""
    return hashlib.sha256(tensor.view(np.uint8).reshape(-1).data).hexdigest()


class NativeSink:
    """Write one iteration. Tensors come kind by kind, each kind in the tensor table's order.

    Args:
        dtypes: what is held for every tensor, and in which dtype ("model" first).
        documents: small text files of the trainer to store beside the index, by file name.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        layout: Layout,
        dtypes: Mapping[Kind, str],
        iteration: int,
        companions: Companions,
        documents: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self.iteration = iteration
        self._config, self._layout, self._dtypes, self._companions = config, layout, dict(dtypes), companions
        self._documents = dict(documents or {})
        self._shards: dict[str, list[Shard]] = {name: [] for name in tensor_table(config)}
        for shard in shards(config, layout, tied_head_copy=False):
            self._shards[shard.spec.name].append(shard)
        total = sum(spec.numel for spec in tensor_table(config).values())
        check_free_space(self.folder, sum(total * DTYPES[dtype].itemsize for dtype in self._dtypes.values()))
        self._publication = Publication(iteration_folder(self.folder, iteration), replace=True)
        self._writers = self._open_writers()
        self._index: dict[str, dict[str, Any]] = {}
        self._hasher = ThreadPoolExecutor(1)

    def write(self, name: str, tensor: np.ndarray, kind: Kind = "model") -> None:
        check_shape("checkpoint to be written", name, tensor.shape, self._shards[name][0].spec.shape)
        dtype = DTYPES[self._dtypes[kind]]
        key = key_of(name, kind)
        slices = []
        for shard in self._unique(self._shards[name]):
            part = np.ascontiguousarray(cut(tensor, shard.part), dtype=dtype)
            digest = self._hasher.submit(sha256, part)
            file = self._file(shard, kind)
            self._writers[file].write(key, part)
            slices.append({"file": file, "boxes": shard.part.boxes, "sha256": digest.result()})
        spec = self._shards[name][0].spec
        self._index[key] = {
            "shape": spec.shape,
            "dtype": dtype_name(dtype),
            "stacked_dim": spec.split.dim or 0,
            "slices": slices,
        }

    def close(self) -> None:
        missing = [
            key_of(name, kind)
            for kind in self._dtypes
            for name in self._shards
            if key_of(name, kind) not in self._index
        ]
        if missing:
            raise UserError(f"{self.folder}: {missing[0]} was never written ({len(missing)} tensors missing)")
        self._hasher.shutdown()
        for writer in self._writers.values():
            writer.close()
        work = self._publication.work
        write_companions(work / COMPANIONS, self._companions, self._config, self._dtypes["model"])
        for file_name, text in self._documents.items():
            (work / file_name).write_text(text, encoding="utf-8")
        (work / INDEX).write_text(json.dumps(self._describe()) + "\n", encoding="utf-8")
        self._publication.commit()
        write_text_atomically(self.folder / TRACKER, str(self.iteration))

    def abort(self) -> None:
        self._hasher.shutdown()
        for writer in self._writers.values():
            writer.abort()
        self._publication.abort()

    def _describe(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "iteration": self.iteration,
            "model": self._config.to_dict(),
            "layout": asdict(self._layout),
            "kinds": self._dtypes,
            "tensors": self._index,
        }

    def _file(self, shard: Shard, kind: Kind) -> str:
        folder = rank_folder(self._layout, shard.tensor_rank, shard.pipeline_rank)
        return f"{folder}/{'model' if kind == 'model' else 'optimizer'}.safetensors"

    @staticmethod
    def _unique(found: list[Shard]) -> list[Shard]:
        """Replicated tensors are stored once, by the first tensor rank."""
        return [shard for shard in found if shard.spec.split.dim is not None or shard.tensor_rank == 0]

    def _open_writers(self) -> dict[str, SafetensorsWriter]:
        entries: dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]] = {}
        for kind, dtype in self._dtypes.items():
            for name, found in self._shards.items():
                for shard in self._unique(found):
                    file = entries.setdefault(self._file(shard, kind), {})
                    file[key_of(name, kind)] = (DTYPES[dtype], shard.shape)
        return {file: SafetensorsWriter(self._publication.work / file, table) for file, table in entries.items()}


@dataclass(frozen=True)
class _Slice:
    file: str
    part: Part
    sha256: str


class NativeSource:
    """Read one iteration, whatever layout wrote it. Every slice's sha256 is checked as it is read.

    Args:
        iteration: which one; None for the one that the tracker file names.

    Raises:
        UserError: no such checkpoint, an unknown version, a missing, truncated or damaged file, a missing tensor.
    """

    def __init__(self, folder: str | Path, iteration: int | None = None) -> None:
        self.folder = find_iteration(folder, iteration)
        self.location = str(self.folder)
        self._index = self._read_index()
        self.config = ModelConfig.from_dict(self._index["model"])
        self.companions = companions_of(self.folder / COMPANIONS)
        self.layout = Layout.from_dict(self._index["layout"])
        self._check()

    def kinds(self) -> tuple[Kind, ...]:
        return tuple(self._index["kinds"])

    def dtype(self, name: str, kind: Kind = "model") -> np.dtype:
        return DTYPES[self._index["kinds"][kind]]

    def read(self, name: str, kind: Kind = "model") -> np.ndarray:
        key = key_of(name, kind)
        item = self._index["tensors"][key]
        slices = [self._slice(entry, item["stacked_dim"]) for entry in item["slices"]]
        if len(slices) == 1:
            return self._read_slice(key, slices[0])
        tensor = np.empty(item["shape"], DTYPES[item["dtype"]])
        for entry in slices:
            paste(tensor, self._read_slice(key, entry), entry.part)
        return tensor

    def read_part(self, name: str, part: Part, kind: Kind = "model") -> np.ndarray:
        return cut(self.read(name, kind), part)

    def document(self, name: str) -> str:
        """A text file that the trainer stored with the checkpoint.

        Raises:
            UserError: it is not there: the checkpoint was not written by a trainer.
        """
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{self.folder} has no {name}: it was written by a conversion, not by a training run")
        return path.read_text(encoding="utf-8")

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no {INDEX}: not a native checkpoint") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged: {error}") from error
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise UserError(
                f"{path}: format {index.get('format')!r} version {index.get('version')!r}; this release reads "
                f"{FORMAT!r} version {VERSION}"
            )
        return index

    def _check(self) -> None:
        expected = {key_of(name, kind) for kind in self.kinds() for name in tensor_table(self.config)}
        check_names(self.location, set(self._index["tensors"]), expected)
        files = {entry["file"] for item in self._index["tensors"].values() for entry in item["slices"]}
        self._files = {file: SafetensorsFile(self.folder / file) for file in sorted(files)}

    @staticmethod
    def _slice(entry: dict[str, Any], dim: int) -> _Slice:
        boxes = tuple(tuple((start, stop) for start, stop in box) for box in entry["boxes"])
        return _Slice(entry["file"], Part(boxes, dim), entry["sha256"])

    def _read_slice(self, key: str, entry: _Slice) -> np.ndarray:
        file = self._files[entry.file]
        if key not in file.entries:
            raise UserError(f"{file.path}: tensor {key} is missing; {INDEX} says it is there")
        part = file.read(key)
        if sha256(part) != entry.sha256:
            raise UserError(f"{file.path}: tensor {key} is damaged: its sha256 differs from the one in {INDEX}")
        return part


def prompt_entry(source: TensorSource) -> dict[str, Any] | None:
    """What a fine-tuned checkpoint says of its template; None for any other source."""
    if not isinstance(source, NativeSource) or not (source.folder / PROMPT_FILE).exists():
        return None
    entry: dict[str, Any] = json.loads(source.document(PROMPT_FILE))
    return entry
