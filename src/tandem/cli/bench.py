"""`tandem bench`: are these devices right, and how fast are they?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tandem.bench.options import BenchOptions
from tandem.bench.page import shown
from tandem.bench.run import StageResult, bench
from tandem.cli.arguments import parse
from tandem.errors import UserError

DESCRIPTION = (
    "Measure the devices of this machine, without data or weights: whether they compute what a CPU computes, then "
    "speed and memory of training, on one device and in layouts of several. Writes one JSON file and one HTML page "
    "that can be sent."
)
SHOWN = (
    "left out",
    *("device", "dtype"),  # bf16 falls back to fp32 where the device has none
    *("the same in fp32", "fp32 gradient difference", "bf16 gradient difference", "clips as the CPU", "skips"),
    *("kernels", "operators", "copies to the device", "waits", "planned kernels"),
    *("logits difference", "seconds", "tokens/s", "MFU", "memory", "planned memory"),
)


def run(argv: Sequence[str]) -> None:
    options = parse(BenchOptions, "bench", DESCRIPTION, argv)
    results = bench(options, show)
    print(f"written: {options.output}, {Path(options.output).with_suffix('.html')}")
    if failed := [result.name for result in results if result.figures is None]:
        raise UserError(f"stages that failed: {'; '.join(failed)}. The page says why")


def show(result: StageResult) -> None:
    if result.figures is None:
        print(f"{result.name}: failed: {result.error.splitlines()[0] if result.error else 'no reason was given'}")
        return
    figures = {name: value for name, value in result.figures.items() if name in SHOWN}
    print(f"{result.name}: " + ", ".join(f"{name} {shown(name, value)}" for name, value in figures.items()), flush=True)
