"""Ranks as threads of one process, for stand-ins of libraries of collectives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

SECONDS = 60.0  # that a rank waits for others, before the test fails
_THREAD = threading.local()


def rank() -> int:
    """The rank that this thread is."""
    return _THREAD.rank


class Meeting:
    """A group of ranks, which exchange values."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)
        self._values: list[Any] = [None] * len(self.members)
        self._barrier = threading.Barrier(len(self.members))

    @property
    def place(self) -> int:
        """This rank's place among the members."""
        return self.members.index(rank())

    def exchange(self, value: Any) -> list[Any]:
        """What each member brings, in their order. Nobody may change it."""
        self._values[self.place] = value
        self._barrier.wait(SECONDS)
        values = list(self._values)
        self._barrier.wait(SECONDS)
        return values


def run_ranks(count: int, function: Callable[[int], Result]) -> list[Result]:
    """What the function gives on each rank. The first rank that fails names the error; others time out."""

    def run(number: int) -> Result:
        _THREAD.rank = number
        return function(number)

    with ThreadPoolExecutor(count) as pool:
        results = [pool.submit(run, number) for number in range(count)]
        errors = [error for result in results if (error := result.exception()) is not None]
        real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        for error in [*real, *errors]:
            raise error
        return [result.result() for result in results]
