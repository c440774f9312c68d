"""The live view of a run on a terminal: progress, speed, and the curve of the loss."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tandem.training.logs.log import StepRecord, perplexity

BARS = "▁▂▃▄▅▆▇█"
SHOWN = ("rewards/accuracies", "rewards/margins", "kl")  # of the metrics of preferences
RECENT = 20  # speed and remaining time are means over this many steps
REFRESHES_PER_SECOND = 2.0


class LiveView:
    """A panel below the plain log lines. It disappears when the run ends."""

    def __init__(self, console: Console | None = None) -> None:
        self._losses: list[float] = []
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
        self._validation: dict[str, float] = {}
        self._tasks: dict[str, Mapping[str, float]] = {}
        self._start = time.monotonic()
        self._live = Live(
            console=console,
            get_renderable=self.render,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        )
        self._live.start()

    def on_step(self, record: StepRecord) -> None:
        if math.isfinite(record.loss):  # the loss of a skipped step may not be finite
            self._losses.append(record.loss)
        self._recent.append(record)
        self._validation.update(record.validation)
        self._tasks.update(record.tasks)

    def close(self) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        if not self._recent:
            return Text("waiting for the first step", style="dim")
        last = self._recent[-1]
        seconds = sum(record.seconds for record in self._recent)
        left = timedelta(seconds=round(seconds / len(self._recent) * (last.train_iters - last.iteration)))
        passed = timedelta(seconds=round(time.monotonic() - self._start))
        table = Table.grid(padding=(0, 1), expand=True)
        for cells in self._cells(last, seconds):
            table.add_row(*cells)
        bar = Table.grid(expand=True)  # the bar alone would not end its line
        bar.add_row(ProgressBar(total=last.train_iters, completed=last.iteration))
        curve = Text(sparkline(self._losses, self._live.console.width - 6), style="cyan")
        title = f"step {last.iteration:,} of {last.train_iters:,}"
        return Panel(Group(bar, table, curve), title=title, subtitle=f"{passed} passed, {left} left", style="default")

    def _cells(self, last: StepRecord, seconds: float) -> list[list[str]]:
        tokens = sum(record.tokens for record in self._recent)
        trained = sum(record.trained_tokens for record in self._recent)
        flops = sum(record.flops for record in self._recent) / seconds / last.devices
        mfu = f", MFU {flops / last.peak_flops:.1%}" if last.peak_flops else ""
        lines = [
            [f"loss [bold]{last.loss:.4f}[/]", f"grad norm {last.grad_norm:.3f}", f"lr {last.lr:.3e}"],
            [
                f"{tokens / seconds:,.0f} tokens/s",
                f"{trained / seconds:,.0f} trained",
                f"{flops / 1e12:.2f} TFLOP/s{mfu}",
            ],
            [f"epoch {last.epoch:.3f}", f"{last.memory / 1e9:.2f} GB", f"batch {last.batch_size}"],
        ]
        if last.metrics:
            lines.append([f"{name} {value:.3f}" for name, value in last.metrics.items() if name in SHOWN])
        for name, loss in self._validation.items():
            lines.append([name, f"loss [bold]{loss:.4f}[/]", f"perplexity {perplexity(loss):.3f}"])
        for name, metrics in self._tasks.items():
            lines.append([name, *(f"{metric} [bold]{value:.4f}[/]" for metric, value in list(metrics.items())[:2])])
        return lines


def sparkline(values: list[float], width: int) -> str:
    """Draw values as bars. More than `width` values are averaged in groups of equal size.

    >>> sparkline([1.0, 2.0, 3.0, 4.0], width=2)
    '▁█'
    """
    if not values:
        return ""
    group = -(-len(values) // max(1, width))
    means = [sum(part) / len(part) for part in (values[i : i + group] for i in range(0, len(values), group))]
    low, high = min(means), max(means)
    return "".join(BARS[int((mean - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for mean in means)
