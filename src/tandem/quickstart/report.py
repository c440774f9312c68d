"""The results of a quickstart: a table, and the loss curve as an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Stage:
    """A stage: name, backend, steps as in metrics.jsonl, and the accuracy on held-out questions after it."""

    name: str
    backend: str
    accuracy: float
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(step["seconds"] for step in self.steps)


def print_table(stages: Sequence[Stage], questions: int, seconds: float) -> None:
    """Print steps, times, losses and held-out accuracy of each stage."""
    table = Table(title=f"Held-out accuracy on {questions} questions; {seconds:.0f} s in all")
    for column in ("stage", "backend", "steps", "seconds", "first loss", "last loss", "tokens/s", "accuracy"):
        table.add_column(column, justify="left" if column in ("stage", "backend") else "right")
    for stage in stages:
        table.add_row(stage.name, stage.backend, *_numbers(stage), f"{stage.accuracy:.1%}")
    Console(width=None if Console().is_terminal else 110).print(table)


def save_curve(stages: Sequence[Stage], path: Path) -> None:
    """Save a plot of the loss over the steps of all stages, with the accuracy after each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    start = 0
    for stage in stages:
        steps = [start + number for number in range(1, len(stage.steps) + 1)]
        losses = [step["loss"] for step in stage.steps]
        if steps:
            label = f"{stage.name} on {stage.backend}: {stage.accuracy:.0%} of answers right"
            axes.plot(steps, losses, label=label)
            start = steps[-1]
    axes.set(xlabel="step", ylabel="loss", title="Tandem quickstart: one run, two frameworks", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _numbers(stage: Stage) -> tuple[str, ...]:
    if not stage.steps:
        return ("", "", "", "", "")
    tokens = sum(step["tokens"] for step in stage.steps)
    return (
        str(len(stage.steps)),
        f"{stage.seconds:.1f}",
        f"{stage.steps[0]['loss']:.3f}",
        f"{stage.steps[-1]['loss']:.3f}",
        f"{tokens / stage.seconds:,.0f}",
    )
