"""`metrics.jsonl`: one JSON line for each step of a run, whatever stopped and resumed it in between."""

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
    """Appends a line per step, as soon as it ends.

    Args:
        iteration: where the run stands. Lines of later steps, which an earlier process took and did not save, are
            cut off first, and so is the unfinished line that a kill may leave.

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
    """A step as plain values: times in seconds, memory in bytes, rates per second over all devices, but for
    `tflops_per_device`; `mfu` is null where the device's peak is not known, loss and
    gradient norm where they are not finite."""
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
    """The steps of a run, in order; an unfinished last line, of a run that goes on, is left out.

    Raises:
        UserError: the file is missing, or a line is not one of metrics.
    """
    return read_json_lines(Path(path), "iteration", int)


def _end_of(path: Path, iteration: int) -> int:
    """Bytes of the whole lines up to `iteration`."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or parse_line(path, number, line, "iteration", int)["iteration"] > iteration:
                break
            end += len(line)
    return end
