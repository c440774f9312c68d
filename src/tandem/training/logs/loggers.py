"""Who is told of each step: the files and services that a run's settings name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from logging import INFO
from pathlib import Path
from typing import Any, Protocol

from tandem.config.settings import LoggingSettings
from tandem.logs import log
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


@dataclass(frozen=True)
class LoggedRun:
    """What loggers must know of a run.

    Attributes:
        iteration: where it stands.
        folder: of the run; None when it saves nothing.
        settings: all of the run's, to be shown.
    """

    ai_framework: str
    iteration: int
    folder: Path | None
    settings: dict[str, Any]


@contextmanager
def step_loggers(logging: LoggingSettings, run: LoggedRun, on_step: OnStep | None) -> Iterator[OnStep]:
    """Open every logger of a run; yields the function that tells them, and `on_step`, of a step.

    Raises:
        UserError: a file cannot be written, or a library is not installed.
    """
    with ExitStack() as stack:
        listeners = [on_step] if on_step else []
        for logger in _opened(logging, run):
            stack.callback(logger.close)
            listeners.append(logger.on_step)

        def tell(record: StepRecord) -> None:
            for listener in listeners:
                listener(record)

        yield tell


def _opened(logging: LoggingSettings, run: LoggedRun) -> Iterator[StepLogger]:
    """Each logger is opened when it is asked for, so that those before it can be closed should that fail."""
    if run.folder is not None:
        yield MetricsFile(run.folder / METRICS_FILE, run.iteration)
    if logging.tensorboard_dir is not None:
        yield TensorBoardWriter(logging.tensorboard_dir, logging.tensorboard_log_interval, run.iteration)
    if logging.wandb_project is not None:
        yield WandbRun(logging, run.folder, run.settings)
    if logging.profile:
        yield StepProfiler(logging, run.ai_framework, run.folder, run.iteration)
    if sys.stdout.isatty() and log.isEnabledFor(INFO) and not logging.no_live_view:
        yield LiveView()
