"""What a run prints: plain lines that survive in a log file, the iteration line in Megatron's format."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tandem.launch.world import World
from tandem.logs import log

Write = Callable[[str], None]
VALIDATION = "validation"  # the name of the validation set, when there is only the split's


def log_notice(text: str) -> None:
    """What the user must know, said by the first rank."""
    if World.from_environment().rank == 0:
        log.info("> %s", text)


@dataclass(frozen=True)
class StepRecord:
    """One finished step, as the logs keep it.

    Attributes:
        lr, next_lr: the step's rate, and that of the step to come: Megatron prints that one.
        epoch: passes over the training samples so far.
        tokens, trained_tokens: of the global batch; padding is never among them.
        seconds: wall time of the step.
        flops: floating-point operations that the step needed, on all `devices` together.
        peak_flops: a device's peak per second, where it is known.
        memory: peak bytes of the first rank's device so far; on CPU, of its process.
        skipped: the step was not applied: its loss or gradient norm was not finite, or its loss 0 or a spike.
        loss_scale: of the step's gradients; 1 but for fp16.
        validation: mean loss of each validation set, when the step ended with an evaluation.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    batch_size: int
    loss: float
    grad_norm: float
    lr: float
    next_lr: float
    epoch: float
    tokens: int
    trained_tokens: int
    seconds: float
    flops: float
    devices: int
    peak_flops: float | None
    memory: int
    skipped: bool = False
    loss_scale: float = 1.0
    validation: Mapping[str, float] = field(default_factory=dict)

    @property
    def tflops_per_device(self) -> float:
        return self.flops / self.seconds / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation ("PaLM", arXiv 2204.02311, appendix B): needed operations over the peak's."""
        return self.tflops_per_device * 1e12 / self.peak_flops if self.peak_flops else None


def perplexity(loss: float) -> float:
    """Of a mean loss; bounded as Megatron's is, e^20."""
    return math.exp(min(20.0, loss))


class IterationLog:
    """Gathers steps and writes one line every `interval`."""

    def __init__(self, interval: int, log_throughput: bool, write: Write = log.info) -> None:
        self._interval = interval
        self._log_throughput, self._write = log_throughput, write
        self._window: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self._window.append(record)
        if record.iteration % self._interval == 0:
            self._write(self._line(record))
            self._window = []

    def _line(self, last: StepRecord) -> str:
        """MindSpeed-LLM's and Megatron-LM's training line; the loss is the mean over the steps that were applied since
        the last line, and left out when none was."""
        steps = len(self._window)
        seconds = sum(record.seconds for record in self._window) / steps
        losses = [record.loss for record in self._window if not record.skipped]
        line = f" [{time.strftime('%Y-%m-%d %H:%M:%S')}]"
        line += f" iteration {last.iteration:8d}/{last.train_iters:8d} |"
        line += f" consumed samples: {last.consumed_samples:12d} |"
        line += f" elapsed time per iteration (ms): {seconds * 1000:.1f} |"
        if self._log_throughput:
            flops = sum(record.flops for record in self._window) / steps
            line += f" throughput per GPU (TFLOP/s/GPU): {flops / seconds / last.devices / 1e12:.1f} |"
        line += f" learning rate: {last.next_lr:.6E} |"
        line += f" global batch size: {last.batch_size:5d} |"
        if losses:
            line += f" lm loss: {sum(losses) / len(losses):.6E} |"
        line += f" loss scale: {last.loss_scale:.1f} |"
        line += f" grad norm: {last.grad_norm:.3f} |"
        line += f" number of skipped iterations: {steps - len(losses):3d} |"
        line += f" number of nan iterations: {sum(not math.isfinite(record.loss) for record in self._window):3d} |"
        return line


def evaluation_line(iteration: int, name: str, loss: float) -> str:
    """Megatron's lines after an evaluation; a set other than the split's own is named."""
    on = "" if name == VALIDATION else f" on {name}"
    line = (
        f" validation loss at iteration {iteration}{on} | lm loss value: {loss:.6E} | "
        f"lm loss PPL: {perplexity(loss):.6E} | "
    )
    return "\n".join(["-" * len(line), line, "-" * len(line)])
