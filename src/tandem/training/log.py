"""What a run prints: plain lines that survive in a log file, the iteration line in Megatron's format."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

Print = Callable[[str], None]
print_now: Print = partial(print, flush=True)  # a log file read while the run goes on must not lag


@dataclass(frozen=True)
class StepRecord:
    """One finished step, as metrics keep it.

    `next_lr` is the rate of the step to come: Megatron prints that one. `seconds` is the step's wall time;
    `flops` the floating-point operations it needed, on all `devices` together.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    batch_size: int
    loss: float
    grad_norm: float
    lr: float
    next_lr: float
    tokens: int
    trained_tokens: int
    seconds: float
    flops: float
    devices: int = 1


class IterationLog:
    """Gathers steps and prints one line every `interval`."""

    def __init__(self, interval: int, log_throughput: bool, write: Print = print_now) -> None:
        self._interval = interval
        self._log_throughput, self._write = log_throughput, write
        self._window: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self._window.append(record)
        if record.iteration % self._interval == 0:
            self._write(self._line(record))
            self._window = []

    def _line(self, last: StepRecord) -> str:
        """MindSpeed-LLM's and Megatron-LM's training line; the loss is the mean since the last line."""
        steps = len(self._window)
        seconds = sum(record.seconds for record in self._window) / steps
        loss = sum(record.loss for record in self._window) / steps
        line = f" [{time.strftime('%Y-%m-%d %H:%M:%S')}]"
        line += f" iteration {last.iteration:8d}/{last.train_iters:8d} |"
        line += f" consumed samples: {last.consumed_samples:12d} |"
        line += f" elapsed time per iteration (ms): {seconds * 1000:.1f} |"
        if self._log_throughput:
            flops = sum(record.flops for record in self._window) / steps
            line += f" throughput per GPU (TFLOP/s/GPU): {flops / seconds / last.devices / 1e12:.1f} |"
        line += f" learning rate: {last.next_lr:.6E} |"
        line += f" global batch size: {last.batch_size:5d} |"
        line += f" lm loss: {loss:.6E} |"
        line += " loss scale: 1.0 |"
        line += f" grad norm: {last.grad_norm:.3f} |"
        line += " number of skipped iterations:   0 |"
        line += " number of nan iterations:   0 |"
        return line
