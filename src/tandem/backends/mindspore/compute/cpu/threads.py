"""Element-wise NumPy work over all cores of this process: NumPy lets go of the interpreter lock in large operations."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Result = TypeVar("Result")

# Fewer elements than this are done sooner than another thread wakes up.
WORTH_A_THREAD = 100_000


@functools.cache
def _workers() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # NumPy's error state belongs to a thread: what is not finite shows in the loss and in the norm.
    quiet = functools.partial(np.seterr, all="ignore")
    return ThreadPoolExecutor(_workers() - 1, thread_name_prefix="tandem", initializer=quiet)


def split_work(function: Callable[[slice], Result], size: int, elements: int) -> list[Result]:
    """Call `function` on consecutive slices that cover range(size), one per core; its results in order.

    `elements` is the size of the whole work; the number of slices depends on nothing but this, `size` and the cores
    of the process, so repeated runs add in the same order.
    """
    parts = max(1, min(_workers(), size, elements // WORTH_A_THREAD))
    bounds = [size * part // parts for part in range(parts + 1)]
    slices = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    others = [_pool().submit(function, part) for part in slices[1:]]
    return [function(slices[0]), *(other.result() for other in others)]
