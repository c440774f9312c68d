"""Writing a Hugging Face folder: sharded safetensors and their index, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem.checkpoints.formats.safetensors import SafetensorsWriter
from tandem.checkpoints.hf.companions import write_companions
from tandem.checkpoints.hf.weights import INDEX, SINGLE
from tandem.checkpoints.interface import DTYPES, Companions, RowsWritten, TensorKind
from tandem.errors import UserError
from tandem.files.publish import Publication, check_free_space
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.models.weight_map import WeightMap


@dataclass(frozen=True)
class _Run:
    """Rows `start` to `stop` of a tensor of the table, which belong to one Hugging Face tensor."""

    hf_name: str
    start: int
    stop: int


class HFSink:
    """A Hugging Face folder that `from_pretrained` loads: safetensors of at most `shard_bytes`, config, tokenizer.

    Tensors must come in the tensor table's order.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        dtype: str,
        companions: Companions,
        shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self._config, self._dtype, self._companions = config, dtype, companions
        self._map = WeightMap(config)
        self._shards = self._plan(shard_bytes)
        self._total = sum(math.prod(shape) for shape in self._map.hf_shapes().values()) * DTYPES[dtype].itemsize
        check_free_space(self.folder, self._total)
        self._publication = Publication(self.folder)
        self._open: SafetensorsWriter | None = None
        self._table = tensor_table(config)
        self._names, self._written = list(self._table), 0
        self._rows = RowsWritten()
        # Of the tensor that is being written: what is still to come, as runs of rows of a Hugging Face tensor, and
        # the blocks of rows that some of it needs, each with the number of its first row.
        self._due = self._runs_of(self._names[0])
        self._blocks: list[tuple[int, np.ndarray]] = []
        self._file_of = {hf_name: file for file, names in self._shards.items() for hf_name in names}

    def write(self, name: str, rows: np.ndarray, kind: TensorKind = "model") -> None:
        assert kind == "model", f"a Hugging Face folder holds no {kind}"
        assert name == self._names[self._written], f"{name} written where {self._names[self._written]} was due"
        written = self._rows.add(name, rows, self._table[name].shape)
        self._blocks.append((written.start, rows))
        while self._due and self._due[0].start < written.stop:
            run = self._due.popleft()
            there = min(run.stop, written.stop)
            for first, block in self._blocks:
                if len(piece := block[max(run.start - first, 0) : max(there - first, 0)]):
                    self._writer_for(run.hf_name).write(run.hf_name, piece)
            if there < run.stop:
                self._due.appendleft(_Run(run.hf_name, there, run.stop))
        if self._due:
            self._forget()
        else:
            self._blocks.clear()
            self._written += 1
            self._due = self._runs_of(self._names[self._written]) if self._written < len(self._names) else deque()

    def _runs_of(self, name: str) -> deque[_Run]:
        return deque(
            _Run(hf_name, start, stop) for hf_name, ranges in self._map.rows[name].items() for start, stop in ranges
        )

    def _forget(self) -> None:
        """Let go of the blocks that nothing needs any more. Rows of several Hugging Face tensors may take turns."""
        needed = min(run.start for run in self._due)
        self._blocks = [(first, block) for first, block in self._blocks if first + len(block) > needed]

    def close(self) -> None:
        if self._written != len(self._names):
            raise UserError(f"{self.folder}: {self._names[self._written]} was never written")
        assert self._open is not None
        self._open.close()
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._publication.work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_companions(self._publication.work, self._companions, self._config, self._dtype)
        self._publication.commit()

    def abort(self) -> None:
        if self._open is not None:
            self._open.abort()
        self._publication.abort()

    def _plan(self, shard_bytes: int) -> dict[str, list[str]]:
        """File name -> the tensors it will hold."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, shape in self._map.hf_shapes().items():
            nbytes = math.prod(shape) * DTYPES[self._dtype].itemsize
            if groups[-1] and size + nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += nbytes
        if len(groups) == 1:
            return {SINGLE: groups[0]}
        return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}

    def _writer_for(self, hf_name: str) -> SafetensorsWriter:
        file = self._file_of[hf_name]
        if self._open is None or self._open.path.name != file:
            if self._open is not None:
                self._open.close()
            shapes = self._map.hf_shapes()
            entries = {name: (DTYPES[self._dtype], shapes[name]) for name in self._shards[file]}
            self._open = SafetensorsWriter(self._publication.work / file, entries, {"format": "pt"})
        return self._open
