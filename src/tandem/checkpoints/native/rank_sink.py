"""Writing a native checkpoint from all ranks of a job. Each rank writes its slices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.adapters.base import BaseRecord
from tandem.checkpoints.folders import TRACKER, iteration_folder, rank_folder
from tandem.checkpoints.interface import DTYPES, Companions, TensorKind
from tandem.checkpoints.native.format import IterationWriter, PlannedSlice, SliceFiles, in_words
from tandem.errors import UserError
from tandem.files.publish import Publication, check_free_space, write_text_atomically
from tandem.launch.world import Communicator
from tandem.models.config import ModelConfig
from tandem.parallel.grid import Grid, saved_shards
from tandem.parallel.layout import Shard


class NativeRankSink:
    """One rank's part in writing an iteration. Each rank writes its own slices; no rank gathers those of others.

    All ranks make this object at the same time, and all call `publish`. In between, a rank calls `write_part` for the
    shards of `saved_shards`, in order, and then `finish`. Neither waits for other ranks, so a thread may call them.

    Args:
        by_rows: the kinds that are sharded by rows over data ranks.
        base: the weights of adapters. Then the checkpoint holds only the adapters.
        shared_storage: False when every machine has its own disk. Then each machine gets a folder with the files of its
            ranks and the whole index.

    Raises:
        UserError: on every rank, when one rank cannot make the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        grid: Grid,
        dtypes: Mapping[TensorKind, str],
        iteration: int,
        companions: Companions,
        documents: Mapping[str, str],
        communicator: Communicator,
        *,
        by_rows: Collection[TensorKind],
        base: BaseRecord | None = None,
        shared_storage: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._dtypes, self._communicator = dict(dtypes), communicator
        self._iteration = IterationWriter(
            config, grid.layout, self._dtypes, iteration, companions, dict(documents), base
        )
        self._elsewhere = not shared_storage
        world, place = communicator.world, grid.place(communicator.world.rank)
        self._rank_folder = rank_folder(grid.layout, place.tensor, place.pipeline)
        self._data_rank = place.data
        self._leads = world.leads(shared_storage=shared_storage)
        self._publication: Publication | None = None
        try:
            self._together(self._make_folder)
        except BaseException:
            if self._publication is not None:
                self._publication.abort()
            raise
        first = world.first_on_disk(shared_storage=shared_storage)
        self._names = {kind: set(self._iteration.names(kind)) for kind in self._dtypes}
        plan = [
            self._planned(kind, shard)
            for kind in self._dtypes
            for shard in saved_shards(config, grid, world.rank, by_rows=kind in by_rows, first_rank=first)
            if shard.spec.name in self._names[kind]
        ]
        self._files = SliceFiles(Publication.working_folder(self._final), plan, self._dtypes)

    def takes(self, kind: TensorKind, shard: Shard) -> bool:
        """Whether the checkpoint holds this part of a tensor."""
        return kind in self._names and shard.spec.name in self._names[kind]

    def write_part(self, kind: TensorKind, shard: Shard, values: np.ndarray) -> None:
        assert values.shape == shard.shape, f"{shard.spec.name}: the shape is {values.shape}, expected {shard.shape}"
        self._files.write(self._planned(kind, shard), values, DTYPES[self._dtypes[kind]])

    def finish(self) -> None:
        """Finish this rank's files: they are whole and on the disk."""
        self._files.close()

    def publish(self, error: BaseException | None = None) -> None:
        """Make the iteration visible as the newest one, when every rank has finished.

        Args:
            error: the reason why this rank did not finish.

        Raises:
            UserError: on every rank, when one has failed. Then nothing becomes visible.
        """
        try:
            reports = self._communicator.all_gather([in_words(error), None if error else self._files.index])
            failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(reports) if text]
            if failures:
                raise UserError(f"{self._final} was not saved: {'; '.join(failures)}")
            self._together(lambda: self._publish([index for _, index in reports]))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        self._files.abort()
        if self._publication is not None:
            self._publication.abort()

    @property
    def _final(self) -> Path:
        return iteration_folder(self.folder, self._iteration.number)

    def _together(self, act: Callable[[], None]) -> None:
        """Leaders call `act` while the other ranks wait. When it fails on one rank, every rank raises."""
        failure: Exception | None = None
        if self._leads:
            try:
                act()
            except (UserError, OSError) as error:
                failure = error
        texts = self._communicator.all_gather(in_words(failure))
        if failed := [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]:
            raise UserError(f"{self._final} was not saved: {'; '.join(failed)}") from failure

    def _make_folder(self) -> None:
        world = self._communicator.world
        # Without shared storage a machine holds what its ranks write. Machines may have different numbers of ranks.
        check_free_space(self.folder, self._iteration.nbytes // (world.size if self._elsewhere else 1))
        self._publication = Publication(self._final, replace=True)

    def _publish(self, fragments: Sequence[Mapping[str, Any]]) -> None:
        assert self._publication is not None
        index: dict[str, Any] = {
            key: {**entry, "slices": []} for fragment in fragments for key, entry in fragment.items()
        }
        for fragment in fragments:
            for key, entry in fragment.items():
                index[key]["slices"] += entry["slices"]
        self._iteration.check_complete(self._final, index)
        self._iteration.describe(self._publication.work, index, elsewhere=self._elsewhere)
        self._publication.commit()
        write_text_atomically(self.folder / TRACKER, str(self._iteration.number))

    def _planned(self, kind: TensorKind, shard: Shard) -> PlannedSlice:
        suffix = f"_{self._data_rank:03d}" if self._data_rank else ""  # data ranks share a folder
        return PlannedSlice(
            f"{self._rank_folder}/{'model' if kind == 'model' else 'optimizer'}{suffix}.safetensors", kind, shard
        )
