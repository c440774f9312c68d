"""The training loop: which samples, at which rate, when to evaluate, when to save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from tandem.backends.interface import Engine, StepResult
from tandem.config.settings import Settings
from tandem.data.batch import MicroBatch
from tandem.data.datasets.dataset import Dataset
from tandem.errors import UserError
from tandem.launch.world import Communicator, SingleProcess
from tandem.models.flops import training_flops
from tandem.parallel.grid import Grid
from tandem.planning.hardware import peak_flops
from tandem.training.diagnosis import dump, first_bad
from tandem.training.evaluation import Share, evaluate
from tandem.training.guard import Guard
from tandem.training.logs.log import IterationLog, StepRecord, evaluation_line
from tandem.training.loss_scale import LossScale
from tandem.training.objectives import MeanLoss, Objective, RankBatch, UntrainedError
from tandem.training.progress import Progress, Saver
from tandem.training.schedule import Schedule
from tandem.training.signals import StopSignals

Number = TypeVar("Number", int, float)


class _Told(Exception):
    """A signal has arrived at some rank."""


class Trainer:
    """Runs steps from wherever `progress` stands.

    Args:
        grid: all processes of the job; every one runs a trainer, over the samples of its data rank.
        communicator: how they agree.
        saver: asked to save when a checkpoint is due; None when the run saves nothing.
        signals: asked after each step whether one has arrived.
        on_step: called on the first rank with each step's record, after the evaluation that the step ends with.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        schedule: Schedule,
        train_data: Dataset,
        valid_data: Mapping[str, Dataset],
        progress: Progress,
        grid: Grid | None = None,
        communicator: Communicator | None = None,
        saver: Saver | None = None,
        signals: StopSignals | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self.engine, self.settings, self.schedule = engine, settings, schedule
        self.train_data, self.valid_data = train_data, valid_data
        self.progress = progress
        self.grid, self.communicator = grid or Grid(), communicator or SingleProcess()
        self.is_first_rank = self.communicator.world.rank == 0
        data_rank = self.grid.place(self.communicator.world.rank).data
        self._share = Share(settings.training.micro_batch_size, self.grid.data_size, data_rank)
        self.train_iters = settings.length.iterations_from(progress.iteration, progress.consumed_train_samples)
        self._saver, self._on_step = saver, on_step
        self._all_written = True  # whether no rank is still writing a checkpoint
        self._guard = Guard(settings.training, progress.recent_losses)
        self._scale = LossScale.of(settings.training, progress.loss_scale)
        self._objective: Objective = MeanLoss()
        assert not self._objective.needs_log_probabilities, "a forward pass before the step is yet to be written"
        self._signals = signals or StopSignals()
        self._started, self._out_of_time = time.monotonic(), False
        self.stopped: str | None = None  # the signal that ended the run early, on whichever rank it arrived
        self._batch_sizes = settings.length.batch_sizes
        self._samples_per_epoch = max(1, train_data.describe()["samples_per_epoch"])
        self._peak_flops = peak_flops(engine.device_name, engine.param_dtype)
        self._log = IterationLog(settings.logging.log_interval, settings.logging.log_throughput)

    def run(self) -> None:
        """Train to the last iteration, to the exit interval, or until asked to stop; what is saved is saved then.

        Raises:
            UserError: a step went wrong and the run is to stop; the newest checkpoint is left as it is.
        """
        saved_at = self.progress.iteration
        while self.progress.iteration < self.train_iters:
            record = self.step()
            if self.is_first_rank:
                self._log.step(record)
            iteration = self.progress.iteration
            if self._due(self.settings.training.eval_interval) and not self.stopped:
                record = replace(record, validation=self._evaluate_and_print())
            if self.is_first_rank and self._on_step:
                self._on_step(record)
            leaving = self._due(self.settings.training.exit_interval) or self._out_of_time or self.stopped is not None
            if self._saver and self._all_written:
                self._saver.publish()
            if self._saver and (self._due(self.settings.checkpoint.save_interval) or leaving):
                self._saver.save(self.progress)
                saved_at = iteration
            if leaving:
                self._print(f"exiting program at iteration {iteration}")
                break
        if self._saver and saved_at != self.progress.iteration:
            self._saver.save(self.progress)

    def step(self) -> StepRecord:
        """One optimizer step over the next global batch."""
        start = time.perf_counter()
        progress = self.progress
        batch = self._batch_sizes.at(progress.consumed_train_samples)
        lr = self.schedule.lr(progress.applied_train_samples)
        weight_decay = self.schedule.weight_decay(progress.applied_train_samples)
        micro_batches = list(self._share.micro_batches(self.train_data, progress.consumed_train_samples, batch))
        weights = self._weigh(micro_batches, batch)
        scale = self._scale.value
        result = self.engine.train_step(micro_batches, weights, lr, weight_decay, self._guard.loss_limit, scale)
        self._judge(result, micro_batches, weights, batch)
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
        )

    def _weigh(self, micro_batches: list[MicroBatch], batch: int) -> list[np.ndarray]:
        """The weights of this rank's tokens. Collective.

        Raises:
            UserError: the global batch has nothing to train.
        """
        trained = self.communicator.all_gather(sum(micro_batch.trained_tokens for micro_batch in micro_batches))
        try:
            _, weights = self._objective(None, RankBatch(micro_batches, self._sum_over_data_ranks(trained)))
        except UntrainedError:
            raise UserError(self._untrained(batch)) from None
        return weights

    def _untrained(self, batch: int) -> str:
        consumed = self.progress.consumed_train_samples
        return (
            f"iteration {self.progress.iteration + 1}: none of its {batch} samples has a trained token, so there is no "
            f"loss; the first is {self.train_data.origin(consumed)}. Preprocess again: `tandem preprocess` leaves such "
            f"samples out, but a smaller --seq-length in training than there may cut all that was trained"
        )

    def _judge(
        self, result: StepResult, micro_batches: list[MicroBatch], weights: list[np.ndarray], batch: int
    ) -> None:
        """Move the loss scale, and act on a step that went wrong in another way than by too large a scale."""
        overflow = math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
        expected = overflow and self._scale.may_fall
        self._scale.update(overflow=overflow)
        self.progress.loss_scale = self._scale.to_dict()
        if not expected and (wrong := self._guard.judge(result)):
            self._pass_over(wrong, result, micro_batches, weights, batch)

    def _pass_over(
        self, wrong: str, result: StepResult, micro_batches: list[MicroBatch], weights: list[np.ndarray], batch: int
    ) -> None:
        """Leave what is known of a step that was not applied.

        Raises:
            UserError: the run is to stop.
        """
        iteration, consumed = self.progress.iteration + 1, self.progress.consumed_train_samples
        samples = [number for numbers in self._share.samples(consumed, batch) for number in numbers]
        known = {
            "wrong": wrong,
            "loss": str(result.loss),
            "grad_norm": str(result.grad_norm),
            "global_batch": [consumed, consumed + batch],
            "samples": {number: self.train_data.origin(number) for number in samples},
        }
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        first = None if finite else first_bad(self.engine, micro_batches, weights)
        save = self.settings.checkpoint.save
        details = dump(Path(save) if save else None, self.communicator, iteration, known, first)
        if self._saver:
            self._saver.publish()  # should the run stop now, what is being written is kept
        self._print(self._guard.act(iteration, wrong, details))

    def _agree(self, micro_batches: list[MicroBatch]) -> tuple[int, float]:
        """Tokens of the global batch, and the floating-point operations that they need; whether all leave,
        and whether a checkpoint can be published."""
        lengths = [int(length) for micro_batch in micro_batches for length in micro_batch.lengths]
        minutes = self.settings.training.exit_duration_in_mins
        late = minutes is not None and time.monotonic() - self._started >= 60 * minutes
        is_written = self._saver is None or self._saver.is_written
        own = [sum(lengths), training_flops(self.engine.config, lengths), self._signals.received, late, is_written]
        tokens, flops, signals, lateness, written = zip(*self.communicator.all_gather(own))
        self._heed(signals)
        self._out_of_time, self._all_written = lateness[0], all(written)
        return self._sum_over_data_ranks(tokens), self._sum_over_data_ranks(flops)

    def _sum_over_data_ranks(self, values: Sequence[Number]) -> Number:
        """Of each rank's number; the other ranks of a model have the same samples."""
        return sum(values[rank] for rank in self.grid.group("data", self.grid.place(0)))

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.progress.iteration % interval == 0  # type: ignore[operator]

    def _evaluate_and_print(self) -> dict[str, float]:
        """Mean loss of each validation set; fewer when a signal ends the evaluation."""
        training = self.settings.training
        batches = None if training.eval_iters == "full" else training.eval_iters
        batch_size = self.settings.global_batch_size
        losses: dict[str, float] = {}
        for name, dataset in self.valid_data.items():
            try:
                found = evaluate(self.engine, dataset, name, self._share, batch_size, batches, self._leave_if_told)
            except _Told:
                break
            losses[name] = found.loss
            self._print(evaluation_line(self.progress.iteration, name, found.loss))
        return losses

    def _leave_if_told(self) -> None:
        """Collective."""
        self._heed(self.communicator.all_gather(self._signals.received))
        if self.stopped:
            raise _Told

    def _heed(self, received: Sequence[str | None]) -> None:
        """Stop when a rank has received a signal."""
        self.stopped = next((signal for signal in received if signal), None)

    def _print(self, text: str) -> None:
        if self.is_first_rank:
            print(text, flush=True)
