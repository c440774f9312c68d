"""Loading weights into engines: in blocks of fp32 rows, from several threads where the framework allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from tandem.checkpoints.interface import DTYPE_ALIASES, TensorKind, TensorSource, check_shape, dtype_name
from tandem.moments import MomentSettings
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


def moment_dtypes(settings: MomentSettings) -> dict[TensorKind, str]:
    """The dtype of each of Adam's moments, a key of `DTYPES`."""
    return {
        "exp_avg": DTYPE_ALIASES[settings.exp_avg_dtype],
        "exp_avg_sq": DTYPE_ALIASES[settings.exp_avg_sq_dtype],
    }


def notices_of_dtypes(
    source: TensorSource, names: Mapping[TensorKind, Iterable[str]], dtypes: Mapping[TensorKind, str]
) -> list[str]:
    """A notice for each kind that the source holds in another dtype than this run."""
    stored = {kind: {dtype_name(source.dtype(name, kind)) for name in names[kind]} - {dtypes[kind]} for kind in names}
    return [
        f"{source.location} holds {kind} in {' and '.join(sorted(others))}; this run keeps it in {dtypes[kind]}"
        for kind, others in stored.items()
        if others
    ]
