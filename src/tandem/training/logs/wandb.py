"""Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.config.settings import LoggingSettings
from tandem.errors import UserError
from tandem.files.publish import check_writable
from tandem.training.logs.log import StepRecord
from tandem.training.logs.scalars import scalars

WITHOUT_KEY = ("offline", "dryrun", "disabled")  # values of WANDB_MODE


def check_wandb(logging: LoggingSettings) -> None:
    """Raise UserError when the library is not installed, has no key where it needs one, or cannot write its files.

    On a terminal it asks for a key when the run starts.
    """
    wandb = _library(logging)
    if logging.wandb_save_dir is not None:
        check_writable(logging.wandb_save_dir, "--wandb-save-dir")
    if wandb.setup().settings.mode not in WITHOUT_KEY and not (sys.stdin.isatty() and sys.stderr.isatty()):
        with _refusals(wandb, logging):
            wandb.login()


class WandbRun:
    """Sends every step to a run of `--wandb-project`, with the settings as its config.

    A resumed training becomes a new run on W&B, in the group of its name: W&B does not accept a step twice.

    Args:
        save: folder of the run. Local files go to its wandb folder, unless `--wandb-save-dir` names another.
        config: the settings, for W&B to show.

    Raises:
        UserError: the library is not installed, or cannot start.
    """

    def __init__(self, logging: LoggingSettings, save: Path | None, config: dict[str, Any]) -> None:
        wandb = _library(logging)
        folder = Path(logging.wandb_save_dir) if logging.wandb_save_dir is not None else save and save / "wandb"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with _refusals(wandb, logging):
            self._run: Any = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                group=logging.wandb_exp_name,
                entity=logging.wandb_entity,
                dir=str(folder) if folder is not None else None,
                config=config,
            )

    def on_step(self, record: StepRecord) -> None:
        self._run.log(scalars(record), step=record.iteration)

    def close(self) -> None:
        # A run that ended with an error must not look successful on W&B.
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _library(logging: LoggingSettings) -> Any:
    try:
        import wandb
    except ImportError as error:
        flag = f"--wandb-project {logging.wandb_project}"
        raise UserError(f"{flag}: {error}; pip install 'tandem-llm[wandb]'") from error
    return wandb


@contextmanager
def _refusals(wandb: Any, logging: LoggingSettings) -> Iterator[None]:
    """What the library refuses becomes a UserError."""
    try:
        yield
    except wandb.Error as error:
        raise UserError(f"--wandb-project {logging.wandb_project}: {error}") from error
