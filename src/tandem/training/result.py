"""Training as a function that returns its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config.settings import Settings
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import metrics_of
from tandem.training.run import train


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Attributes:
        iteration: number of steps of the run so far, including those before it was resumed.
        metrics: of each step of this call, as in metrics.jsonl.
        save: folder of the run; None when nothing was saved.
    """

    iteration: int
    metrics: tuple[dict[str, Any], ...]
    save: Path | None

    @property
    def losses(self) -> list[float]:
        """The loss of each step of this call."""
        return [step["loss"] for step in self.metrics]


def train_and_collect(settings: Settings) -> TrainingResult:
    """Train in this process, alone or as one process of a job, and return the results.

    Raises:
        UserError, RunStopped: as `train`.
    """
    steps: list[dict[str, Any]] = []

    def keep(record: StepRecord) -> None:
        steps.append(metrics_of(record))

    trainer = train(settings, keep)
    save = settings.checkpoint.save
    return TrainingResult(trainer.progress.iteration, tuple(steps), Path(save) if save else None)
