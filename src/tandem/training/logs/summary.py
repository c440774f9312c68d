"""What a run says last: how the loss changed, how long it took, what memory it needed, and what to do next."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tandem.training.logs.log import StepRecord


@dataclass
class RunSummary:
    """Collects the steps of one process of a run.

    Attributes:
        folder: of the run; None when it saves nothing.
        answers: whether the run trains on conversations, so that the next thing is to ask the model.
    """

    folder: Path | None
    answers: bool

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._first: StepRecord | None = None
        self._last: StepRecord | None = None
        self._steps, self._seconds, self._tokens, self._skipped = 0, 0.0, 0, 0
        self._validation: dict[str, float] = {}
        self._tasks: dict[str, Mapping[str, float]] = {}

    def step(self, record: StepRecord) -> None:
        if not record.skipped:
            self._first = self._first or record
            self._last = record
        self._end = record
        self._steps += 1
        self._skipped += record.skipped
        self._seconds += record.seconds
        self._tokens += record.tokens
        self._validation.update(record.validation)
        self._tasks.update(record.tasks)

    def lines(self) -> list[str]:
        """The summary; empty when there was no step."""
        if not self._steps:
            return []
        passed = timedelta(seconds=round(time.monotonic() - self._began))
        skipped = f", {self._skipped:,} of them skipped" if self._skipped else ""
        speed = f"{self._seconds / self._steps:.3g} s a step, {self._tokens / self._seconds:,.0f} tokens/s"
        return [
            f"{self._steps:,} steps{skipped} in {passed}: {speed}; peak memory {self._end.memory / 1e9:.2f} GB "
            f"(first process)",
            self._losses(),
            self._place_and_next(),
        ]

    def _losses(self) -> str:
        if self._first is None or self._last is None:
            return "no step was applied: the weights are those that the run began with"
        first, last = self._first, self._last
        loss = f"loss {first.loss:.4f} at step {first.iteration:,}"
        if last is not first:
            loss += f", {last.loss:.4f} at step {last.iteration:,}"
        validation = [f"{name} loss {value:.4f}" for name, value in self._validation.items()]
        tasks = [
            f"{name} {metric} {value:.4f}" for name, metrics in self._tasks.items() for metric, value in metrics.items()
        ]
        return "; ".join([loss, *validation, *tasks])

    def _place_and_next(self) -> str:
        if self.folder is None:
            return "nothing was saved: --save FOLDER keeps the weights"
        folder = shlex.quote(str(self.folder))
        if self._end.iteration < self._end.train_iters:
            left = self._end.train_iters - self._end.iteration
            return f"saved in {folder}; the same command trains the other {left:,} steps"
        if self.answers:
            return f"saved in {folder}; next: tandem generate {folder}"
        return (
            f"saved in {folder}; next: tandem export {folder} NEW_FOLDER, or "
            f"tandem finetune --load {folder} --finetune --save NEW_RUN ..."
        )
