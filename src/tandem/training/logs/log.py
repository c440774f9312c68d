"""What a run prints: plain lines for log files, with iteration lines in Megatron's format."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tandem.launch.world import World
from tandem.logs import log

Write = Callable[[str], None]
# The metrics that upstream prints, too: of preferences, and of experts.
PRINTED = ("rewards/accuracies", "load_balancing_loss", "z_loss")
VALIDATION = "validation"  # name of the validation set from --split, or of a single set without a name


def log_notice(text: str) -> None:
    """Log a notice for the user, on the first rank only."""
    if World.from_environment().rank == 0:
        log.info("> %s", text)


@dataclass(frozen=True)
class StepRecord:
    """One finished step, for the logs.

    Attributes:
        lr: learning rate of this step.
        next_lr: learning rate of the next step, which Megatron prints.
        epoch: number of passes over the training samples so far.
        tokens, trained_tokens: of the global batch. Padding does not count.
        seconds: wall time of the step.
        flops: floating-point operations that the step needed, on all `devices` together.
        peak_flops: largest number of operations per second of a device; None when it is not known.
        memory: peak bytes on the device of the first rank so far; on CPU, of its process.
        skipped: whether the step was not applied. Its loss or gradient norm was not finite, or its loss 0 or a spike.
        loss_scale: scale of the gradients of this step; 1 without fp16.
        validation: mean loss of each validation set, if the step ended with an evaluation.
        metrics: of the objective, by TRL's names.
        validation_metrics: the same of each validation set.
        tasks: metrics of each benchmark by name, if the step ended with them.
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
    metrics: Mapping[str, float] = field(default_factory=dict)
    validation_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def tflops_per_device(self) -> float:
        return self.flops / self.seconds / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation ("PaLM", arXiv 2204.02311, appendix B): needed operations over the peak's."""
        return self.tflops_per_device * 1e12 / self.peak_flops if self.peak_flops else None


def validation_metric(name: str, metric: str) -> str:
    """TRL's name of a metric of a validation set. The name of the set is a part of it, unless it is that from --split.

    >>> validation_metric("validation", "rewards/chosen"), validation_metric("held", "rewards/chosen")
    ('eval_rewards/chosen', 'eval_held_rewards/chosen')
    """
    return f"eval_{'' if name == VALIDATION else f'{name}_'}{metric}"


def validation_metrics(record: StepRecord) -> dict[str, float]:
    """The metrics of the validation sets by TRL's names."""
    return {
        validation_metric(name, metric): value
        for name, metrics in record.validation_metrics.items()
        for metric, value in metrics.items()
    }


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss, at most e^20, as in Megatron.

    >>> perplexity(0.0)
    1.0
    """
    return math.exp(min(20.0, loss))


class IterationLog:
    """Collects steps and writes a line every `interval` steps, and for the first and the last step.

    The line of the first step does not end a window: the next line is a mean over it, too, as in Megatron.
    """

    def __init__(self, interval: int, log_throughput: bool, write: Write = log.info) -> None:
        self.interval = interval
        self._log_throughput, self._write = log_throughput, write
        self._window: list[StepRecord] = []
        self._is_first = True

    def step(self, record: StepRecord, is_last: bool = False) -> None:
        self._window.append(record)
        is_due = record.iteration % self.interval == 0
        if is_due or is_last or self._is_first:
            self._write(self._line(record))
        if is_due:
            self._window = []
        self._is_first = False

    def _line(self, last: StepRecord) -> str:
        """The training line of MindSpeed-LLM and Megatron-LM.

        The loss is the mean over the applied steps since the last line. It is left out when no step was applied.
        """
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
        for name in PRINTED:
            values = [record.metrics[name] for record in self._window if name in record.metrics]
            if values:
                line += f" {name}: {sum(values) / len(values):.6E} |"
        line += f" loss scale: {last.loss_scale:.1f} |"
        line += f" grad norm: {last.grad_norm:.3f} |"
        line += f" number of skipped iterations: {steps - len(losses):3d} |"
        line += f" number of nan iterations: {sum(not math.isfinite(record.loss) for record in self._window):3d} |"
        return line


def evaluation_line(iteration: int, name: str, loss: float, metrics: Mapping[str, float]) -> str:
    """Megatron's lines after an evaluation. The name of a set is shown, unless it is the set from --split.

    Where there are metrics, they take the place of the perplexity: the loss is not one of tokens.
    """
    on = "" if name == VALIDATION else f" on {name}"
    values = metrics or {"lm loss PPL": perplexity(loss)}
    line = f" validation loss at iteration {iteration}{on} | lm loss value: {loss:.6E} | "
    line += "".join(f"{name}: {value:.6E} | " for name, value in values.items())
    return "\n".join(["-" * len(line), line, "-" * len(line)])


def tasks_line(iteration: int, name: str, metrics: Mapping[str, float]) -> str:
    """A line after a benchmark.

    >>> tasks_line(20, "mmlu", {"acc": 0.25})
    ' task mmlu at iteration 20 | acc: 2.500000E-01 | '
    """
    return f" task {name} at iteration {iteration} | " + "".join(f"{key}: {x:.6E} | " for key, x in metrics.items())
