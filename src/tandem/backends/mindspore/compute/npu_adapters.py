"""What adapters compute besides products, on Ascend NPUs.

Written from MindSpore's documentation; there was no NPU to run it on. The CPU's functions document each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from tandem.models.rows import Ranges


@cache
def _numbers(ranges: Ranges) -> Tensor:
    """The row numbers in ranges. They are copied to the device once."""
    return Tensor(np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in ranges]))


def side_by_side(parts: Sequence[tuple[Tensor, float, Ranges]], rows: int) -> Tensor:
    placed = [
        mint.index_add(mint.zeros((rows, part.shape[1]), dtype=part.dtype), 0, _numbers(ranges), part * factor)
        for part, factor, ranges in parts
    ]
    return mint.cat(placed, 1)


def block(x: Tensor, ranges: Ranges, columns: tuple[int, int], factor: float) -> Tensor:
    return mint.index_select(x[:, slice(*columns)], 0, _numbers(ranges)).astype(ms.float32) * factor


def columns(x: Tensor, ranges: Ranges) -> Tensor:
    if ranges == ((0, x.shape[1]),):
        return x
    pieces = [x[:, start:stop] for start, stop in ranges]
    return mint.cat(pieces, 1) if len(pieces) > 1 else pieces[0].contiguous()


def add_columns(x: Tensor, change: Tensor, ranges: Ranges) -> Tensor:
    if ranges == ((0, x.shape[1]),):
        return x + change
    pieces, before, first = [], 0, 0
    for start, stop in ranges:
        added = x[:, start:stop] + change[:, first : first + stop - start]
        pieces += [x[:, before:start], added] if before < start else [added]
        before, first = stop, first + stop - start
    return mint.cat([*pieces, x[:, before:]] if before < x.shape[1] else pieces, 1)


def row_squares(x: Tensor, change: Tensor) -> Tensor:
    return mint.sum(mint.square(x.astype(ms.float32) + change.astype(ms.float32)), 1)


def stretch(parts: Sequence[tuple[Tensor, Ranges]], lengths: Tensor) -> Tensor:
    factors = mint.ones_like(lengths)
    for part, ranges in parts:
        numbers = _numbers(ranges)
        change = part.astype(ms.float32) / mint.index_select(lengths, 0, numbers) - 1
        factors = mint.index_add(factors, 0, numbers, change)
    return factors


def scale_columns(x: Tensor, factors: Tensor) -> Tensor:
    return (x.astype(ms.float32) * factors).astype(x.dtype)


def dot_columns(x: Tensor, y: Tensor) -> Tensor:
    return mint.sum(x.astype(ms.float32) * y.astype(ms.float32), 0)
