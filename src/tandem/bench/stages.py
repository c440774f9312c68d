"""The stages of a benchmark. Each runs in processes of its own and returns figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.bench.layouts import ONE_PROCESS, Spread
from tandem.bench.options import BenchOptions
from tandem.bench.parity import against_transformers, clipping_and_skipping, layout_parity, parity
from tandem.bench.speed import packed, profiled, speed
from tandem.bench.team import ALONE, Team

Figures = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        shows: what it is for.
        run: called in each of its processes. The first one's figures count.
        spread: how many processes it has, and how they share the work.
    """

    name: str
    shows: str
    run: Callable[[BenchOptions, Team], Figures]
    spread: Spread = ALONE.spread


def stages(options: BenchOptions) -> list[Stage]:
    """The stages of a benchmark, in order. The options name the layouts."""
    made = [
        Stage("parity", "toys on the device against the CPU", parity),
        Stage("clipping", "clipping, and steps that are skipped", clipping_and_skipping),
        Stage("transformers", "a toy on the device against transformers", against_transformers),
    ]
    spreads = [Spread.named(name) for name in options.layouts or (ONE_PROCESS,)]
    for spread in spreads:
        if spread.processes > 1:
            shows = f"a toy on {spread.processes} processes against one"
            made.append(Stage(f"{spread.name}, parity", shows, layout_parity, spread))
    for size in options.sizes:
        for spread in spreads:
            made += _of_size(options, size, spread)
    return made


def _of_size(options: BenchOptions, size: str, spread: Spread) -> list[Stage]:
    name = size if spread.processes == 1 else f"{size}, {spread.name}"

    def stage(last: str, shows: str, function: Callable[..., Figures], *arguments: Any) -> Stage:
        return Stage(f"{name}, {last}", shows, lambda options, team: function(options, team, size, *arguments), spread)

    return [
        *(
            stage(f"micro-batch {samples}", "speed and memory of pretraining", speed, samples)
            for samples in options.micro_batch_sizes
        ),
        stage("packed", f"{options.documents} documents in a row, of new lengths", packed),
        stage("profile", "kernels, waits, and where the time goes", profiled),
    ]
