"""`metrics.jsonl`: one JSON line for each step of a run. Each step has one line even if the run was resumed."""

from __future__ import annotations

import os
import time
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from tandem.errors import UserError
from tandem.files.jsonl import append_line, read_json_lines, remove_damaged
from tandem.training.logs.log import StepRecord, validation_metrics

METRICS_FILE = "metrics.jsonl"
IDENTITY = ("iteration", int)  # what every line has


class MetricsFile:
    """Appends a line for each step when it ends.

    Args:
        iteration: the last finished iteration. Lines of later steps are removed first: an earlier process took these
            steps and did not save them. Damaged lines are removed as `remove_damaged` does.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | Path, iteration: int) -> None:
        remove_damaged(Path(path), *IDENTITY)
        try:
            self._file = FileIO(path, "a")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        os.ftruncate(self._file.fileno(), _end_of(Path(path), iteration))

    def on_step(self, record: StepRecord) -> None:
        append_line(self._file, metrics_of(record))

    def close(self) -> None:
        self._file.close()


def metrics_of(record: StepRecord) -> dict[str, Any]:
    """A step as plain values.

    Times are in seconds and memory in bytes. Rates are per second over all devices, except `tflops_per_device`. `mfu`
    is null when the device's peak is not known. Loss and gradient norm are null when they are not finite. The metrics
    of preferences have TRL's names, with "eval_" in front for those of an evaluation.
    """
    return {
        "iteration": record.iteration,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "global_batch_size": record.batch_size,
        "consumed_samples": record.consumed_samples,
        "epoch": record.epoch,
        "tokens": record.tokens,
        "trained_tokens": record.trained_tokens,
        "seconds": record.seconds,
        "tokens_per_second": record.tokens / record.seconds,
        "trained_tokens_per_second": record.trained_tokens / record.seconds,
        "tflops_per_device": record.tflops_per_device,
        "mfu": record.mfu,
        "memory": record.memory,
        "skipped": record.skipped,
        "loss_scale": record.loss_scale,
        "validation": dict(record.validation),
        **record.metrics,
        **validation_metrics(record),
        "tasks": {name: dict(metrics) for name, metrics in record.tasks.items()},
    }


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The steps of a run, in order. An unfinished last line is left out: the run may still be writing it.

    Raises:
        UserError: the file is missing, or contains no metrics.
    """
    return read_json_lines(Path(path), *IDENTITY)


def _end_of(path: Path, iteration: int) -> int:
    """The number of bytes up to the end of the line of `iteration`, in a file whose lines are whole."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if orjson.loads(line)["iteration"] > iteration:
                break
            end += len(line)
    return end
