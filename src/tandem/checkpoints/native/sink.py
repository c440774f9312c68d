"""Writing a native checkpoint from one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tandem.checkpoints.folders import TRACKER, iteration_folder, rank_folder
from tandem.checkpoints.interface import DTYPES, Companions, RowsWritten, TensorKind
from tandem.checkpoints.native.format import IterationWriter, PlannedSlice, SliceFiles, key_of
from tandem.files.publish import Publication, check_free_space, write_text_atomically
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout, Shard, shards
from tandem.parallel.slices import cut_rows


class NativeSink:
    """Write one iteration. Tensors come kind by kind, each kind in the tensor table's order.

    Args:
        dtypes: the kinds that are held for every tensor, with their dtypes ("model" first).
        documents: small text files of the trainer, by name, which are stored next to the index.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        layout: Layout,
        dtypes: Mapping[TensorKind, str],
        iteration: int,
        companions: Companions,
        documents: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self._dtypes, self._rows = dict(dtypes), RowsWritten()
        self._iteration = IterationWriter(config, layout, self._dtypes, iteration, companions, dict(documents or {}))
        self._shards: dict[str, list[Shard]] = {name: [] for name in tensor_table(config)}
        for shard in shards(config, layout, tied_head_copy=False):
            # Replicated tensors are stored once, by the first tensor rank.
            if (shard.spec.split.dim is not None or shard.tensor_rank == 0) and 0 not in shard.shape:
                self._shards[shard.spec.name].append(shard)
        check_free_space(self.folder, self._iteration.nbytes)
        self._publication = Publication(iteration_folder(self.folder, iteration), replace=True)
        self._files = SliceFiles(self._publication.work, self._plan(), self._dtypes)

    def write(self, name: str, rows: np.ndarray, kind: TensorKind = "model") -> None:
        first = self._rows.add(key_of(name, kind), rows, self._shards[name][0].spec.shape).start
        for shard in self._shards[name]:
            rows_here = cut_rows(rows, first, shard.part)
            if rows_here.size:
                self._files.write(self._planned(kind, shard), rows_here, DTYPES[self._dtypes[kind]])

    def close(self) -> None:
        self._iteration.check_complete(self.folder, self._files.keys)
        self._files.close()
        self._iteration.describe(self._publication.work, self._files.index, elsewhere=False)
        self._publication.commit()
        write_text_atomically(self.folder / TRACKER, str(self._iteration.number))

    def abort(self) -> None:
        self._files.abort()
        self._publication.abort()

    def _plan(self) -> list[PlannedSlice]:
        return [
            self._planned(kind, shard)
            for kind in self._dtypes
            for name_shards in self._shards.values()
            for shard in name_shards
        ]

    def _planned(self, kind: TensorKind, shard: Shard) -> PlannedSlice:
        folder = rank_folder(self._iteration.layout, shard.tensor_rank, shard.pipeline_rank, shard.expert_rank)
        return PlannedSlice(f"{folder}/{'model' if kind == 'model' else 'optimizer'}.safetensors", kind, shard)
