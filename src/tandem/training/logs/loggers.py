"""The loggers of a run: the files and services of its settings that get every step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from logging import INFO
from pathlib import Path
from typing import Any, Protocol

from tandem.config.settings import LoggingSettings
from tandem.files.publish import check_writable
from tandem.logs import log
from tandem.training.logs.live import LiveView
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import METRICS_FILE, MetricsFile
from tandem.training.logs.profiling import StepProfiler
from tandem.training.logs.tensorboard import TensorBoardWriter, check_tensorboard
from tandem.training.logs.wandb import WandbRun, check_wandb

OnStep = Callable[[StepRecord], None]


class StepLogger(Protocol):
    """Gets every step of a run, on the first rank."""

    def on_step(self, record: StepRecord) -> None: ...

    def close(self) -> None:
        """Called once at the end, even after an error."""
        ...


@dataclass(frozen=True)
class LoggedRun:
    """What loggers need to know about a run.

    Attributes:
        iteration: the last finished iteration.
        folder: of the run; None when the run saves nothing.
        settings: all settings of the run, by group.
    """

    ai_framework: str
    iteration: int
    folder: Path | None
    settings: dict[str, Any]


@contextmanager
def step_loggers(logging: LoggingSettings, run: LoggedRun, others: Sequence[OnStep] = ()) -> Iterator[OnStep]:
    """Open every logger of a run. Yields a function that passes a step to `others` and to all loggers.

    Raises:
        UserError: a file cannot be written, or a library is not installed.
    """
    with ExitStack() as stack:
        listeners = list(others)
        for logger in _open(logging, run):
            stack.callback(logger.close)
            listeners.append(logger.on_step)

        def log_step(record: StepRecord) -> None:
            for listener in listeners:
                listener(record)

        yield log_step


def check_loggers(logging: LoggingSettings) -> None:
    """Raise UserError when a logger of these settings could not be opened. Nothing is written, and nothing is sent."""
    if logging.tensorboard_dir is not None:
        check_tensorboard(logging.tensorboard_dir)
    if logging.wandb_project is not None:
        check_wandb(logging)
    if logging.profile and logging.profile_save_path is not None:
        check_writable(logging.profile_save_path, "--profile-save-path")


def _open(logging: LoggingSettings, run: LoggedRun) -> Iterator[StepLogger]:
    """Open the loggers one by one. If one fails, the caller can close those before it."""
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
