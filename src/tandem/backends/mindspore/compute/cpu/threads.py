"""Element-wise NumPy work on all cores of this process. NumPy frees Python's lock in large operations."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Result = TypeVar("Result")

# With fewer elements, the work is done before another thread wakes up.
WORTH_A_THREAD = 100_000


@functools.cache
def _workers() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Each thread has its own NumPy error state. Numbers that are not finite show in the loss and in the norm.
    quiet = functools.partial(np.seterr, all="ignore")
    return ThreadPoolExecutor(_workers() - 1, thread_name_prefix="tandem", initializer=quiet)


def split_work(function: Callable[[slice], Result], size: int, elements: int) -> list[Result]:
    """Call `function` on consecutive slices that cover range(size), one per core. Returns its results, in order.

    `elements` is the size of the whole work. The number of slices depends only on it, on `size` and on the cores of the
    process. So repeated runs add in the same order.

    >>> split_work(lambda part: part.stop - part.start, size=10, elements=50)
    [10]
    """
    parts = max(1, min(_workers(), size, elements // WORTH_A_THREAD))
    bounds = [size * part // parts for part in range(parts + 1)]
    slices = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    futures = [_pool().submit(function, part) for part in slices[1:]]
    return [function(slices[0]), *(future.result() for future in futures)]
