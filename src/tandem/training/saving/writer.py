"""Saving a run: at once, or in the background; old checkpoints removed, exports started."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.backends.interface import Engine
from tandem.checkpoints.folders import iteration_folder
from tandem.checkpoints.interface import TENSOR_KINDS, Companions, TensorKind
from tandem.checkpoints.native.rank_sink import NativeRankSink
from tandem.checkpoints.prompt import PROMPT_FILE
from tandem.config.settings import CheckpointSettings, ParallelSettings
from tandem.errors import UserError
from tandem.launch.world import Communicator
from tandem.logs import log
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Shard
from tandem.training.logs.events import EventLog
from tandem.training.progress import Progress
from tandem.training.saving.hf_export import HFExports
from tandem.training.saving.retention import remove_superseded
from tandem.training.start.state import OPTIMIZER_KINDS, SETTINGS_FILE, STATE_FILE, TrainerState

Part = tuple[TensorKind, Shard, np.ndarray]
SECONDS_BETWEEN_SIGNS = 2.0


@dataclass(frozen=True)
class RunDescription:
    """What each checkpoint of a run says besides its tensors and how far the run has come.

    Attributes:
        settings: the run's, as YAML.
        data: what defines the order of the samples, to be compared on resuming.
        template: the record's entry of the template trained on (None for plain text); generation and export use it.
    """

    settings: str
    seed: int
    data: dict[str, Any]
    template: dict[str, Any] | None
    companions: Companions


def kinds_by_rows(parallel: ParallelSettings) -> tuple[TensorKind, ...]:
    """What an engine shards by rows over data ranks."""
    if parallel.use_torch_fsdp2:
        return TENSOR_KINDS
    return tuple(kind for kind in TENSOR_KINDS if kind != "model") if parallel.use_distributed_optimizer else ()


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written: what has failed, once this rank's files are written; when saving began, and
    how long training has waited for it."""

    sink: NativeRankSink
    iteration: int
    failure: Future[Exception | None]
    began: float
    waited: float


class CheckpointWriter:
    """Saves a run as native checkpoints. Every rank has one; `save` and `publish` are collective.

    With `--async-save` a checkpoint is copied to host memory, written by a thread, and becomes visible at the first
    `publish` after that; otherwise `save` does it all. Each iteration becomes visible, and the newest, only when it is
    whole.

    Leaving its `with` block publishes what was saved, and waits for exports; with an error, it waits for no other rank.

    Args:
        folder: of the run; `settings.save`.
        by_rows: as `kinds_by_rows`.
        resumed: the iteration of `folder` that the run goes on from; it is not removed.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        description: RunDescription,
        engine: Engine,
        grid: Grid,
        communicator: Communicator,
        events: EventLog,
        *,
        by_rows: tuple[TensorKind, ...],
        resumed: int | None = None,
    ) -> None:
        self._folder, self._settings, self._description = folder, settings, description
        self._engine, self._grid, self._communicator, self._events = engine, grid, communicator, events
        self._by_rows, self._resumed = by_rows, resumed
        self._shared_storage = not settings.no_shared_storage
        self._leads = communicator.world.leads(shared_storage=self._shared_storage)
        self._thread = ThreadPoolExecutor(1)
        self._copies: list[np.ndarray] = []
        self._pending: _Pending | None = None
        self._exports = HFExports(folder, settings.export_hf_every, events)

    def save(self, progress: Progress) -> None:
        """Write one iteration, after the one before it.

        Raises:
            UserError: on every rank, when one could not write this checkpoint, or the one before it.
        """
        self.publish()
        began = time.perf_counter()
        sink = self._open_sink(progress)
        failure: Future[Exception | None] = Future()
        try:
            if self._settings.async_save:
                failure = self._thread.submit(_write, sink, self._copied())
            elif self._communicator.world.size > 1:  # this thread tells the other ranks that it goes on
                failure = self._thread.submit(_write, sink, self._parts())
            else:
                failure.set_result(_write(sink, self._parts()))
        except BaseException:
            sink.abort()
            raise
        self._pending = _Pending(sink, progress.iteration, failure, began, time.perf_counter() - began)
        if not self._settings.async_save:
            self.publish()

    @property
    def is_written(self) -> bool:
        """Whether nothing of this rank is being written. Not collective."""
        return self._pending is None or self._pending.failure.done()

    def publish(self) -> None:
        """Make what was saved visible, when every rank has written its part; does nothing when it is.

        Raises:
            UserError: on every rank, when one could not write it.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        start = time.perf_counter()
        try:
            self._wait_for_all(pending.failure)
            failure = pending.failure.result()
        except BaseException:
            wait([pending.failure])  # what is still being written cannot be removed
            pending.sink.abort()
            raise
        pending.sink.publish(failure)
        now = time.perf_counter()
        if self._leads:
            self._tidy(pending.iteration)
        if self._communicator.world.rank == 0:
            self._tell(pending.iteration, waited=pending.waited + now - start, seconds=now - pending.began)
            self._exports.start(pending.iteration)

    def _wait_for_all(self, written: Future[Exception | None]) -> None:
        """Until every rank has written. Meanwhile ranks hear of each other every few seconds, so that a slow one, for
        however long, is not taken for a lost one, for which collectives time out."""
        while not all(self._communicator.all_gather(bool(wait([written], SECONDS_BETWEEN_SIGNS).done))):
            pass

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        else:
            self._abandon()

    def _finish(self) -> None:
        """Publish what was saved, and wait for exports."""
        self.publish()
        self._thread.shutdown()
        self._exports.wait()

    def _abandon(self) -> None:
        """After an error, which other ranks may not share: wait for none of them, and leave what is not visible yet."""
        if self._communicator.world.size == 1:
            self.publish()
        self._thread.shutdown()
        if self._pending is not None:
            self._pending.sink.abort()
        self._exports.stop()

    def _open_sink(self, progress: Progress) -> NativeRankSink:
        description = self._description
        state = TrainerState(
            iteration=progress.iteration,
            consumed_train_samples=progress.consumed_train_samples,
            optimizer_step=self._engine.optimizer_step,
            seed=description.seed,
            data=description.data,
            skipped_train_samples=progress.skipped_train_samples,
            recent_losses=progress.recent_losses,
            loss_scale=progress.loss_scale,
        )
        documents = {STATE_FILE: state.to_json(), SETTINGS_FILE: description.settings}
        if description.template is not None:
            documents[PROMPT_FILE] = json.dumps(description.template, indent=2) + "\n"
        return NativeRankSink(
            self._folder,
            self._engine.config,
            self._grid,
            self._kinds(),
            progress.iteration,
            description.companions,
            documents,
            self._communicator,
            by_rows=self._by_rows,
            shared_storage=self._shared_storage,
        )

    def _kinds(self) -> dict[TensorKind, str]:
        kinds: dict[TensorKind, str] = {"model": self._engine.param_dtype}
        if not self._settings.no_save_optim:
            if self._engine.param_dtype != "float32":
                kinds["master"] = "float32"
            kinds |= dict.fromkeys(OPTIMIZER_KINDS, "float32")
        return kinds

    def _parts(self) -> Iterator[Part]:
        kinds = self._kinds()
        tensors = self._engine.tensors(self._communicator.world.first_on_disk(shared_storage=self._shared_storage))
        return (part for part in tensors if part[0] in kinds)

    def _copied(self) -> list[Part]:
        """This rank's tensors, copied. The copies' memory is kept for the next save: new pages cost as much again."""
        copied: list[Part] = []
        for number, (kind, shard, values) in enumerate(self._parts()):
            if number == len(self._copies):
                self._copies.append(np.empty(values.shape, values.dtype))
            np.copyto(self._copies[number], values)
            copied.append((kind, shard, self._copies[number]))
        return copied

    def _tidy(self, newest: int) -> None:
        """Remove what is superseded. A folder that cannot be removed is named, and does not end the run."""
        try:
            remove_superseded(
                self._folder,
                newest,
                self._settings.save_total_limit,
                self._settings.save_retain_interval,
                needed={self._resumed, self._exports.reading},
            )
        except OSError as error:
            log.warning("  an old checkpoint cannot be removed: %s: %s", error.filename, error.strerror)

    def _tell(self, iteration: int, waited: float, seconds: float) -> None:
        files = iteration_folder(self._folder, iteration).rglob("*")
        nbytes = sum(path.stat().st_size for path in files if path.is_file())
        log.info(
            f"  successfully saved checkpoint from iteration {iteration:7d} to {self._folder} "
            f"({nbytes / 1e6:,.1f} MB in {seconds:.2f} s, {nbytes / 1e6 / seconds:,.0f} MB/s; training waited "
            f"{waited:.2f} s)"
        )
        self._events.add("saved", iteration=iteration, seconds=round(waited, 3), bytes=nbytes)


def _write(sink: NativeRankSink, parts: Iterable[Part]) -> Exception | None:
    """Write one rank's files. What fails is returned: the other ranks must hear of it."""
    try:
        for kind, shard, values in parts:
            sink.write_part(kind, shard, values)
        sink.finish()
    except (UserError, OSError) as error:
        return error
    return None
