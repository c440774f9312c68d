"""Measure two sides in turns, each in processes of its own, so that noise of the machine hits both alike.

A benchmark names its sides as functions that build a model and return a `Step`. The script calls itself with `--side`
for each turn; the parent prints medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# number of the step -> {"tokens": what counts as speed, "loss": ..., and what else a benchmark wants of its last step}
Step = Callable[[int], dict[str, float]]
Side = Callable[[argparse.Namespace], Step]

MARK = "turn: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="measured steps per turn, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)


def run(sides: dict[str, Side], arguments: argparse.Namespace) -> dict[str, dict[str, Any]] | None:
    """In the parent: alternate the sides and return each one's summary. In a child (`--side`): take one turn."""
    if arguments.side:
        print(MARK + json.dumps(_turn(sides[arguments.side], arguments)), flush=True)
        return None
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name in sides:
            turn = _child(name)
            turns[name].append(turn)
            seconds = ", ".join(f"{second:.2f}" for second in turn["seconds"])
            losses = ", ".join(f"{loss:.4f}" for loss in turn["losses"])
            processor = ", ".join(f"{second:.2f}" for second in turn["processor"])
            print(
                f"{name:>24}: {seconds} s ({processor} s of processors); losses {losses}; "
                f"peak {turn['peak'] / 2**30:.2f} GiB",
                flush=True,
            )
    return {name: _summary(of_side) for name, of_side in turns.items()}


def _turn(side: Side, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(arguments.threads)
    step = side(arguments)
    step(0)
    reset_peak()
    seconds, processor, results = [], [], []
    for number in range(1, arguments.steps + 1):
        start, start_of_processor = time.perf_counter(), time.process_time()
        results.append(step(number))
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_of_processor)
    rates = [result["tokens"] / second for result, second in zip(results, seconds)]
    losses = [result["loss"] for result in results]
    times = {"seconds": seconds, "processor": processor, "rates": rates}
    return {**times, "losses": losses, "peak": peak(), "last": results[-1]}


def _child(side: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            turn: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return turn
    raise SystemExit(f"{side} ended with code {done.returncode} and without a result (-9: out of memory)")


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [rate for turn in turns for rate in turn["rates"]]
    processor = [second for turn in turns for second in turn["processor"]]
    return {
        "rate": statistics.median(rates),
        "processor": statistics.median(processor),
        "peak": max(turn["peak"] for turn in turns),
        "last": turns[-1]["last"],
    }


def reset_peak() -> None:
    """Reset VmHWM, so that building a model is not measured."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The largest resident memory since `reset_peak`, bytes."""
    return _status("VmHWM")


def resident() -> int:
    """Resident memory now, bytes."""
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
