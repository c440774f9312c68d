"""Who is told of each step: the files and services that a run's settings name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from tandem.config.settings import Settings
from tandem.training.logs.live import LiveView
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import METRICS_FILE, MetricsFile
from tandem.training.logs.profiling import StepProfiler
from tandem.training.logs.tensorboard import TensorBoardWriter
from tandem.training.logs.wandb import WandbRun

OnStep = Callable[[StepRecord], None]


class StepLogger(Protocol):
    """Follows a run on its first rank."""

    def on_step(self, record: StepRecord) -> None: ...

    def close(self) -> None:
        """Called once, also when the run ends with an error."""
        ...


@contextmanager
def step_loggers(settings: Settings, iteration: int, on_step: OnStep | None) -> Iterator[OnStep]:
    """Open every logger of a run that stands at `iteration`; yields the function that tells them, and `on_step`, of a
    step.

    Raises:
        UserError: a file cannot be written, or a library is not installed.
    """
    with ExitStack() as stack:
        listeners = [on_step] if on_step else []
        for open_logger in _openers(settings):
            logger = open_logger(iteration)
            stack.callback(logger.close)
            listeners.append(logger.on_step)

        def tell(record: StepRecord) -> None:
            for listener in listeners:
                listener(record)

        yield tell


def _openers(settings: Settings) -> Iterator[Callable[[int], StepLogger]]:
    save, logging = settings.checkpoint.save, settings.logging
    tensorboard = logging.tensorboard_dir
    if save is not None:
        yield lambda iteration: MetricsFile(Path(save) / METRICS_FILE, iteration)
    if tensorboard is not None:
        yield lambda iteration: TensorBoardWriter(tensorboard, logging.tensorboard_log_interval, iteration)
    if logging.wandb_project is not None:
        yield lambda _: WandbRun(settings)
    if logging.profile:
        yield lambda iteration: StepProfiler(settings, iteration)
    if sys.stdout.isatty() and not logging.no_live_view:
        yield lambda _: LiveView()
