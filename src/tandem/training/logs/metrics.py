"""`metrics.jsonl`: one JSON line for each step of a run. Each step has one line even if the run was resumed."""

from __future__ import annotations

import os
import time
from io import FileIO
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.files.jsonl import append_line, parse_line, read_json_lines
from tandem.training.logs.log import StepRecord

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends a line for each step when it ends.

    Args:
        iteration: the last finished iteration. Lines of later steps are removed first: an earlier process took these
            steps and did not save them. An unfinished line of a killed process is also removed.

    Raises:
        UserError: the file cannot be written, or is not a metrics file.
    """

    def __init__(self, path: str | Path, iteration: int) -> None:
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
    is null when the device's peak is not known. Loss and gradient norm are null when they are not finite.
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
    }


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The steps of a run, in order. An unfinished last line is left out: the run may still be writing it.

    Raises:
        UserError: the file is missing, or a line does not contain metrics.
    """
    return read_json_lines(Path(path), "iteration", int)


def _end_of(path: Path, iteration: int) -> int:
    """The number of bytes up to the end of the line of `iteration`."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or parse_line(path, number, line, "iteration", int)["iteration"] > iteration:
                break
            end += len(line)
    return end
