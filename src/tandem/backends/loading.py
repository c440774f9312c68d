"""Loading weights into engines: in blocks of fp32 rows, from several threads where the framework allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from tandem.checkpoints.interface import TensorKind, TensorSource, check_shape
from tandem.parallel.slices import Part

T = TypeVar("T")


def load_each(load: Callable[[T], None], items: Iterable[T], readers: int) -> None:
    """Call `load` with each item, from `readers` threads. The first failure is raised."""
    if readers == 1:
        for item in items:
            load(item)
        return
    with ThreadPoolExecutor(readers) as threads:
        for _ in threads.map(load, items):
            pass


def stream_fp32(source: TensorSource, name: str, part: Part, kind: TensorKind) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows of a part: fp32, contiguous and writable, each with the number of its first row.

    Raises:
        UserError: the source fails, or yields another shape.
    """
    if 0 in part.shape:
        return
    last = 0
    for block in source.stream(name, part, kind):
        first, last = last, last + len(block)
        check_shape(source.location, name, (max(last, part.shape[0]), *block.shape[1:]), part.shape)
        yield first, np.require(block, np.float32, ["C", "W"])
    check_shape(source.location, name, (last, *part.shape[1:]), part.shape)
