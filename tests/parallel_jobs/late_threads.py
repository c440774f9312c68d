"""A rank whose threads of gloo ask for Python's lock while it ends: python late_threads.py CODE

Here the main thread keeps the lock from its last collective to its end, as it may by chance on a busy machine. Ended by
`sys.exit`, this rank dies of SIGABRT: "terminate called without an active exception".
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable

import torch

from tandem.backends.torch.communication import all_gather, connect, make_groups
from tandem.launch.member import exit_with
from tandem.launch.world import World
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout

NUMBERS = 2**22  # so many that gloo is still at work when the call returns


class Slow:
    """Gives threads time while an interpreter is taken apart."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(0.5)


slow = Slow()


def main() -> int:
    atexit.register(print, "functions that were registered have run")
    world = World.from_environment()
    connect(world, "cpu", timeout_minutes=5)
    group = make_groups(Grid(Layout(), world.size), world.rank, interleaved=False).data.group
    for _ in range(4):
        all_gather(torch.empty(world.size * NUMBERS), torch.ones(NUMBERS), group)
    sys.setswitchinterval(1000)
    until = time.perf_counter() + 1
    while time.perf_counter() < until:
        pass
    return int(sys.argv[1])


if __name__ == "__main__":
    exit_with(main)
