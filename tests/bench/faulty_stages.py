"""Stages of a benchmark of which rank 1 of two meets a FAULT: python faulty_stages.py FILE, as the worker."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tandem.bench import worker
from tandem.bench.layouts import Spread
from tandem.bench.options import BenchOptions
from tandem.bench.stages import Stage
from tandem.bench.team import Team
from tandem.launch.member import exit_with


def meet(options: BenchOptions, team: Team) -> dict[str, Any]:
    fault = os.environ["FAULT"]
    if os.environ["RANK"] == "0" or fault == "hang":
        time.sleep(60)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("no kernel for this")


def work(options: BenchOptions, team: Team) -> dict[str, Any]:
    return {"layout": "tp2", "largest": team.largest(1.0)}


STAGES = [Stage("faulty, dp2", "", meet, Spread.named("dp2")), Stage("next", "", work)]


@contextmanager
def joined(options: BenchOptions, spread: Spread) -> Iterator[Team]:
    """Without a framework."""
    yield Team(spread)


if __name__ == "__main__":
    worker.stages = lambda options: STAGES  # type: ignore[attr-defined]
    worker.joined = joined  # type: ignore[attr-defined]
    exit_with(lambda: worker.main(sys.argv[1]))
