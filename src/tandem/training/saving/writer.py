"""Saves a run, at once or in the background. Also removes old checkpoints and starts exports."""

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
from tandem.checkpoints.adapters.base import BaseRecord
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
from tandem.training.start.state import SETTINGS_FILE, STATE_FILE, TrainerState

Part = tuple[TensorKind, Shard, np.ndarray]
SECONDS_BETWEEN_SIGNS = 2.0


@dataclass(frozen=True)
class RunDescription:
    """What each checkpoint of a run stores besides tensors and progress.

    Attributes:
        settings: of the run, as YAML.
        data: what determines the order of the samples. A resumed run compares it.
        origin: what the run first started from. A resumed run compares it.
        template: the chat template, as in the data's record; None for plain text. Generation and export use it.
        base: the weights of adapters, when only these are saved.
    """

    settings: str
    seed: int
    data: dict[str, Any]
    origin: dict[str, Any]
    template: dict[str, Any] | None
    companions: Companions
    base: BaseRecord | None = None


def kinds_by_rows(parallel: ParallelSettings) -> tuple[TensorKind, ...]:
    """The kinds of tensors that an engine shards by rows over data ranks."""
    if parallel.use_torch_fsdp2:
        return TENSOR_KINDS
    return tuple(kind for kind in TENSOR_KINDS if kind != "model") if parallel.use_distributed_optimizer else ()


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        failure: the error of this rank, or None, when its files are written.
        began: when saving began.
        waited: seconds that training has waited for it.
    """

    sink: NativeRankSink
    iteration: int
    failure: Future[Exception | None]
    began: float
    waited: float


class CheckpointWriter:
    """Saves a run as native checkpoints. Every rank has a writer; `save` and `publish` are collective.

    Without `--async-save`, `save` does everything. With it, `save` copies the checkpoint to host memory, a thread
    writes it, and the next `publish` makes it visible. An iteration becomes visible only when it is complete.

    At the end of a `with` block, the writer publishes what was saved and waits for exports. After an error, it does not
    wait for other ranks.

    Args:
        folder: of the run; `settings.save`.
        by_rows: the result of `kinds_by_rows`.
        resumed: the iteration in `folder` that the run was resumed from. It is not removed.
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
        """Save an iteration. Publishes the previous one first.

        Raises:
            UserError: on every rank, when a rank could not write this checkpoint or the previous one.
        """
        self.publish()
        began = time.perf_counter()
        sink = self._open_sink(progress)
        failure: Future[Exception | None] = Future()
        try:
            if self._settings.async_save:
                failure = self._thread.submit(_write, sink, self._copied(sink))
            elif self._communicator.world.size > 1:  # meanwhile this thread tells the other ranks that it is alive
                failure = self._thread.submit(_write, sink, self._parts(sink))
            else:
                failure.set_result(_write(sink, self._parts(sink)))
        except BaseException:
            sink.abort()
            raise
        self._pending = _Pending(sink, progress.iteration, failure, began, time.perf_counter() - began)
        if not self._settings.async_save:
            self.publish()

    @property
    def is_written(self) -> bool:
        """Whether this rank has finished writing. Not collective."""
        return self._pending is None or self._pending.failure.done()

    def publish(self) -> None:
        """Wait until every rank has written its part of the last checkpoint, and make it visible.

        Does nothing when it is already visible.

        Raises:
            UserError: on every rank, when a rank could not write its part.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        start = time.perf_counter()
        try:
            self._wait_for_all(pending.failure)
            failure = pending.failure.result()
        except BaseException:
            wait([pending.failure])  # files cannot be removed while they are being written
            pending.sink.abort()
            raise
        pending.sink.publish(failure)
        now = time.perf_counter()
        if self._leads:
            self._remove_old(pending.iteration)
        if self._communicator.world.rank == 0:
            self._log_saved(pending.iteration, waited=pending.waited + now - start, seconds=now - pending.began)
            self._exports.start(pending.iteration)

    def _wait_for_all(self, written: Future[Exception | None]) -> None:
        """Wait until every rank has written. The ranks talk every few seconds, so that no collective times out while a
        slow rank writes."""
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
        """Publish the last checkpoint, and wait for exports."""
        self.publish()
        self._thread.shutdown()
        self._exports.wait()

    def _abandon(self) -> None:
        """Clean up after an error. Other ranks may not have the error: do not wait for them, and publish nothing."""
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
            origin=description.origin,
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
            base=self._description.base,
            shared_storage=self._shared_storage,
        )

    def _kinds(self) -> dict[TensorKind, str]:
        kinds: dict[TensorKind, str] = {"model": self._engine.param_dtype}
        if not self._settings.no_save_optim:
            if self._engine.param_dtype != "float32":
                kinds["master"] = "float32"
            kinds |= self._engine.moment_dtypes
        return kinds

    def _parts(self, sink: NativeRankSink) -> Iterator[Part]:
        first = self._communicator.world.first_on_disk(shared_storage=self._shared_storage)
        return self._engine.tensors(first, sink.takes)

    def _copied(self, sink: NativeRankSink) -> list[Part]:
        """Copies of this rank's tensors. Their memory is used again for the next save: new pages take as long again."""
        parts: list[Part] = []
        for number, (kind, shard, values) in enumerate(self._parts(sink)):
            if number == len(self._copies):
                self._copies.append(np.empty(values.shape, values.dtype))
            np.copyto(self._copies[number], values)
            parts.append((kind, shard, self._copies[number]))
        return parts

    def _remove_old(self, newest: int) -> None:
        """Remove superseded checkpoints. A folder that cannot be removed gives a warning, and does not end the run."""
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

    def _log_saved(self, iteration: int, waited: float, seconds: float) -> None:
        files = iteration_folder(self._folder, iteration).rglob("*")
        nbytes = sum(path.stat().st_size for path in files if path.is_file())
        log.info(
            f"  successfully saved checkpoint from iteration {iteration:7d} to {self._folder} "
            f"({nbytes / 1e6:,.1f} MB in {seconds:.2f} s, {nbytes / 1e6 / seconds:,.0f} MB/s; training waited "
            f"{waited:.2f} s)"
        )
        self._events.add("saved", iteration=iteration, seconds=round(waited, 3), bytes=nbytes)


def _write(sink: NativeRankSink, parts: Iterable[Part]) -> Exception | None:
    """Write the files of this rank. Returns the error, if any, since the other ranks must learn about it."""
    try:
        for kind, shard, values in parts:
            sink.write_part(kind, shard, values)
        sink.finish()
    except (UserError, OSError) as error:
        return error
    return None
