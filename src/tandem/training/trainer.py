"""The training loop: takes samples, sets the learning rate, trains, evaluates and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from tandem.backends.interface import Engine, StepResult
from tandem.config.lengths import RunLength
from tandem.data.batch import MicroBatch
from tandem.data.datasets.dataset import Dataset
from tandem.errors import UserError
from tandem.launch.world import Communicator
from tandem.logs import log
from tandem.models.flops import training_flops
from tandem.parallel.grid import Grid
from tandem.planning.hardware import peak_flops
from tandem.training.diagnosis import dump, first_bad
from tandem.training.evaluation import Validation, evaluate
from tandem.training.expert_load import ExpertWatch, from_json, to_json
from tandem.training.feed import Feed, Share
from tandem.training.guard import Guard
from tandem.training.logs.log import IterationLog, StepRecord, evaluation_line, tasks_line
from tandem.training.loss_scale import LossScale
from tandem.training.objectives import (
    Evaluation,
    MeanLoss,
    Objective,
    RankBatch,
    UntrainedError,
    Weighed,
    over_data_ranks,
)
from tandem.training.preferences import without_unweighted
from tandem.training.progress import Progress, Saver
from tandem.training.run_tasks import RunTasks, TaskMetrics
from tandem.training.schedule import Schedule
from tandem.training.signals import StopSignals

Number = TypeVar("Number", int, float)


class _Signalled(Exception):
    """A signal has arrived at a rank."""


@dataclass(frozen=True)
class Intervals:
    """How often a run evaluates, saves and exits: after iterations that are a multiple of these; None for never.

    Attributes:
        exit: the run saves and exits.
        exit_minutes: the run saves and exits after the first step that ends later than this.
    """

    evaluation: int | None = None
    save: int | None = None
    exit: int | None = None
    exit_minutes: float | None = None


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Runs the steps after `progress`.

    Attributes:
        grid: the place of every process of the job. Each process runs a trainer on its `share` of each batch.
        communicator: how the processes agree.
        folder: of the run, for details of bad steps; None when the run saves nothing.
        saver: saves checkpoints; None when the run saves nothing.
        signals: checked after each step.
        on_step: called on the first rank with the record of each step, after its evaluation.
        tasks: the benchmarks that are asked during training.
        experts: follows the experts of a model that has some.
        stopped: the signal that ended the run early, on any rank; None when there was none.
    """

    engine: Engine
    grid: Grid
    communicator: Communicator
    train_data: Dataset
    validation: Validation
    share: Share
    length: RunLength
    schedule: Schedule
    progress: Progress
    guard: Guard
    loss_scale: LossScale
    intervals: Intervals
    log: IterationLog
    signals: StopSignals
    objective: Objective = field(default_factory=MeanLoss)
    folder: Path | None = None
    saver: Saver | None = None
    on_step: Callable[[StepRecord], None] | None = None
    tasks: RunTasks | None = None
    experts: ExpertWatch | None = None

    def __post_init__(self) -> None:
        self.stopped: str | None = None
        self.is_first_rank = self.communicator.world.rank == 0
        self.train_iters = self.length.iterations_from(self.progress.iteration, self.progress.consumed_train_samples)
        self._first_iteration = self.progress.iteration + 1
        self._all_written = True  # whether no rank is still writing a checkpoint
        self._started, self._out_of_time = time.monotonic(), False
        self._samples_per_epoch = max(1, self.train_data.describe()["samples_per_epoch"])
        self._feed = Feed(self.train_data, self.share, ahead=self.engine.reads_ahead)
        self._total = over_data_ranks(self.communicator, self.grid)
        self._peak_flops = peak_flops(self.engine.device_name, self.engine.param_dtype)

    def run(self) -> None:
        """Train until the last iteration, the exit interval, or a signal. Then save.

        Raises:
            UserError: a step failed and the run must stop. The newest checkpoint stays as it is.
        """
        with self._feed:
            self._run()

    def _run(self) -> None:
        started_at = saved_at = self.progress.iteration
        applied = False  # whether any step was
        self._note_signals(self.communicator.all_gather(self.signals.received))  # those of the start
        while self.progress.iteration < self.train_iters and not self.stopped:
            record = self.step()
            applied |= not record.skipped
            iteration = self.progress.iteration
            is_last = iteration == self.train_iters
            leaving = self._due(self.intervals.exit) or self._out_of_time or self.stopped is not None
            if self.is_first_rank:
                self.log.step(record, is_last=is_last or leaving)
            if (self._due(self.intervals.evaluation) or is_last) and not self.stopped:
                results = self._evaluate()
                record = replace(
                    record,
                    validation={name: result.loss for name, result in results.items()},
                    validation_metrics={name: result.metrics for name, result in results.items()},
                )
            if self.tasks and (self._due(self.tasks.interval) or is_last) and not self.stopped:
                record = replace(record, tasks=self._ask(self.tasks))
            if self.is_first_rank and self.on_step:
                self.on_step(record)
            leaving = leaving or self.stopped is not None  # a signal may have come during the evaluation
            if self.saver and self._all_written:
                self.saver.publish()
            if self.saver and (self._due(self.intervals.save) or leaving):
                self.saver.save(self.progress)
                saved_at = iteration
            if leaving:
                self._log_first(f"exiting program at iteration {iteration}")
                break
        if self.saver and saved_at != self.progress.iteration:
            self.saver.save(self.progress)
        if not applied and self.progress.iteration > started_at:
            self._warn_untrained(self.progress.iteration - started_at)

    def _warn_untrained(self, steps: int) -> None:
        """Say that all steps were skipped."""
        reason = "give --on-bad-step stop to see the first bad one"
        if self.loss_scale.window is not None:
            reason = (
                f"if they overflowed in fp16, the loss scale, which is now {self.loss_scale.value:g}, is still too "
                f"large: take more steps, or a smaller --initial-loss-scale, or --bf16"
            )
        if self.is_first_rank:
            log.warning("nothing was trained: all %d steps were skipped; %s", steps, reason)

    def step(self) -> StepRecord:
        """One optimizer step on the next global batch."""
        start = time.perf_counter()
        progress = self.progress
        batch = self.length.batch_sizes.at(progress.consumed_train_samples)
        lr = self.schedule.lr(progress.applied_train_samples)
        weight_decay = self.schedule.weight_decay(progress.applied_train_samples)
        micro_batches = self._feed.take(progress.consumed_train_samples, batch)
        if progress.iteration + 1 < self.train_iters:
            following = progress.consumed_train_samples + batch
            self._feed.begin(following, self.length.batch_sizes.at(following))
        weighed = self._weigh(micro_batches, batch)
        run, weights = micro_batches, weighed.weights
        if self.objective.needs_log_probabilities:
            run, weights = without_unweighted(micro_batches, weights)
        scale = self.loss_scale.value
        result = self.engine.train_step(run, weights, lr, weight_decay, self.guard.loss_limit, scale, weighed.loss)
        self._judge(result, run, weights, batch)
        if not result.applied:
            progress.skipped_train_samples += batch
        progress.iteration += 1
        progress.consumed_train_samples += batch
        tokens, flops = self._agree(micro_batches)
        return StepRecord(
            iteration=progress.iteration,
            train_iters=self.train_iters,
            consumed_samples=progress.consumed_train_samples,
            batch_size=batch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            next_lr=self.schedule.lr(progress.applied_train_samples),
            epoch=progress.consumed_train_samples / self._samples_per_epoch,
            tokens=tokens,
            trained_tokens=result.trained_tokens,
            seconds=time.perf_counter() - start,
            flops=flops,
            devices=self.grid.size,
            peak_flops=self._peak_flops,
            memory=self.engine.peak_memory(),
            skipped=not result.applied,
            loss_scale=scale,
            metrics={**weighed.metrics, **self._expert_metrics()},
        )

    def _expert_metrics(self) -> dict[str, float]:
        """How busy the experts were, if this step gets a line in the log. Collective."""
        iteration = self.progress.iteration
        is_end = iteration in (self._first_iteration, self.train_iters)
        is_logged = is_end or iteration % self.log.interval == 0
        if self.experts is None or not is_logged:
            return {}
        loads = self.communicator.all_gather(to_json(self.engine.expert_load()))
        return self.experts.metrics(iteration, map(from_json, loads)) if self.is_first_rank else {}

    def _weigh(self, micro_batches: list[MicroBatch], batch: int) -> Weighed:
        """The weights of this rank's tokens. Collective.

        Raises:
            UserError: no token of the global batch is trained.
        """
        trained = self.communicator.all_gather(sum(micro_batch.trained_tokens for micro_batch in micro_batches))
        of_rank = RankBatch(micro_batches, self._sum_over_data_ranks(trained), self._total)
        needed = self.objective.needs_log_probabilities
        log_probabilities = self.engine.log_probabilities(micro_batches) if needed else None
        try:
            return self.objective(log_probabilities, of_rank)
        except UntrainedError:
            raise UserError(self._untrained(batch)) from None

    def _untrained(self, batch: int) -> str:
        consumed = self.progress.consumed_train_samples
        return (
            f"iteration {self.progress.iteration + 1}: none of the {batch} samples has a trained token, so there is no "
            f"loss; the first sample is {self._feed.origin(consumed)}. Preprocess again: `tandem preprocess` "
            f"leaves out such samples. A smaller --seq-length in training may also cut all trained tokens"
        )

    def _judge(
        self, result: StepResult, micro_batches: list[MicroBatch], weights: list[np.ndarray], batch: int
    ) -> None:
        """Update the loss scale, and handle a bad step, unless the only reason is a loss scale that is too large."""
        overflow = math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
        expected = overflow and self.loss_scale.may_fall
        self.loss_scale.update(overflow=overflow)
        self.progress.loss_scale = self.loss_scale.to_dict()
        if not expected and (reason := self.guard.judge(result)):
            self._handle_bad_step(reason, result, micro_batches, weights, batch)

    def _handle_bad_step(
        self, reason: str, result: StepResult, micro_batches: list[MicroBatch], weights: list[np.ndarray], batch: int
    ) -> None:
        """Write details of a step that was not applied, and skip it.

        Raises:
            UserError: the run must stop.
        """
        iteration, consumed = self.progress.iteration + 1, self.progress.consumed_train_samples
        samples = [number for numbers in self.share.samples(consumed, batch) for number in numbers]
        values = {
            "wrong": reason,
            "loss": str(result.loss),
            "grad_norm": str(result.grad_norm),
            "global_batch": [consumed, consumed + batch],
            "samples": {number: self._feed.origin(number) for number in samples},
        }
        is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        first = None if is_finite else first_bad(self.engine, micro_batches, weights)
        details = dump(self.folder, self.communicator, iteration, values, first)
        if self.saver:
            self.saver.publish()  # keep the checkpoint that is being written, in case the run stops now
        self._log_first(self.guard.act(iteration, reason, details))

    def _agree(self, micro_batches: list[MicroBatch]) -> tuple[int, float]:
        """Agree with all ranks on the signals, the end of the time, and whether a checkpoint can be published.

        Returns:
            Tokens of the global batch, and the floating-point operations that they need.
        """
        lengths = [int(length) for micro_batch in micro_batches for length in micro_batch.lengths]
        minutes = self.intervals.exit_minutes
        is_late = minutes is not None and time.monotonic() - self._started >= 60 * minutes
        is_written = self.saver is None or self.saver.is_written
        rank_flops = training_flops(self.engine.config, lengths)
        values = [sum(lengths), rank_flops, self.signals.received, is_late, is_written]
        tokens, flops, signals, late, written = zip(*self.communicator.all_gather(values))
        self._note_signals(signals)
        self._out_of_time, self._all_written = late[0], all(written)
        return self._sum_over_data_ranks(tokens), self._sum_over_data_ranks(flops)

    def _sum_over_data_ranks(self, values: Sequence[Number]) -> Number:
        """The sum of the values of the data ranks. Tensor and pipeline ranks of a data rank have the same samples."""
        return sum(values[rank] for rank in self.grid.group("data", self.grid.place(0)))

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.progress.iteration % interval == 0  # type: ignore[operator]

    def _evaluate(self) -> dict[str, Evaluation]:
        """The evaluation of each validation set, by name. A signal ends it early."""
        results: dict[str, Evaluation] = {}
        for name, dataset in self.validation.sets.items():
            try:
                results[name] = evaluate(
                    self.engine,
                    dataset,
                    name,
                    self.share,
                    self.validation.batch_size,
                    self.validation.batches,
                    self._raise_if_signalled,
                    self.objective,
                    self._total,
                )
            except _Signalled:
                break
            self._log_first(evaluation_line(self.progress.iteration, name, results[name].loss, results[name].metrics))
        return results

    def _ask(self, tasks: RunTasks) -> TaskMetrics:
        """What the model scores in the benchmarks, on the first rank. A signal ends them early."""
        try:
            found = tasks.ask(self._raise_if_signalled)
        except _Signalled:
            return {}
        for name, metrics in found.items():
            self._log_first(tasks_line(self.progress.iteration, name, metrics))
        return found

    def _raise_if_signalled(self) -> None:
        """Raise `_Signalled` when a signal has arrived at a rank. Collective."""
        self._note_signals(self.communicator.all_gather(self.signals.received))
        if self.stopped:
            raise _Signalled

    def _note_signals(self, received: Sequence[str | None]) -> None:
        """Remember the first signal that a rank has received: the run then stops."""
        self.stopped = next((signal for signal in received if signal), None)

    def _log_first(self, text: str) -> None:
        if self.is_first_rank:
            log.info(text)
