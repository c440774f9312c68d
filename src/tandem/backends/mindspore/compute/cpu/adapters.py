"""What adapters compute besides products, on CPU, in NumPy. With fp16, everything in between is fp32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.compute.cpu.threads import split_work
from tandem.backends.mindspore.weight import empty, single
from tandem.models.rows import Ranges


def side_by_side(parts: Sequence[tuple[Tensor, float, Ranges]], rows: int) -> Tensor:
    """[rows, sum of r]: each part [o, r] times its factor, at its ranges of rows, and zeros elsewhere."""
    result, values = empty(rows, sum(part.shape[1] for part, _, _ in parts), dtype=parts[0][0].dtype)
    values.fill(0)
    column = 0
    for part, factor, ranges in parts:
        source, first = part.asnumpy(), 0
        columns = slice(column, column + source.shape[1])
        for start, stop in ranges:
            values[start:stop, columns] = single(source[first : first + stop - start]) * np.float32(factor)
            first += stop - start
        column = columns.stop
    return result


def block(x: Tensor, ranges: Ranges, columns: tuple[int, int], factor: float) -> Tensor:
    """The rows at `ranges` of some columns of x, times a factor, fp32."""
    values = x.asnumpy()[:, slice(*columns)]
    return Tensor.from_numpy(np.concatenate([values[start:stop] for start, stop in ranges]) * np.float32(factor))


def columns(x: Tensor, ranges: Ranges) -> Tensor:
    """The columns of x [n, o] at ranges, side by side."""
    result, values = empty(x.shape[0], sum(stop - start for start, stop in ranges), dtype=x.dtype)
    np.concatenate([x.asnumpy()[:, start:stop] for start, stop in ranges], axis=1, out=values)
    return result


def add_columns(x: Tensor, change: Tensor, ranges: Ranges) -> Tensor:
    """x [n, o], which may be changed, with `change` added to its columns at ranges."""
    values, changes, first = x.asnumpy(), change.asnumpy(), 0
    for start, stop in ranges:
        values[:, start:stop] += changes[:, first : first + stop - start]
        first += stop - start
    return x


def row_squares(x: Tensor, change: Tensor) -> Tensor:
    """The sums of squares of the rows of x + change, both [n, k]: fp32 [n]."""
    rows, changes = x.asnumpy(), change.asnumpy()
    squares = np.empty(len(rows), np.float32)

    def run(part: slice) -> None:
        total = single(rows[part]) + single(changes[part])
        np.einsum("nk,nk->n", total, total, out=squares[part])

    split_work(run, len(rows), rows.size)
    return Tensor.from_numpy(squares)


def stretch(parts: Sequence[tuple[Tensor, Ranges]], lengths: Tensor) -> Tensor:
    """Each part's numbers divided by the lengths at its ranges, and 1 elsewhere, fp32 [n]."""
    divisors = lengths.asnumpy()
    factors = np.ones(len(divisors), np.float32)
    for part, ranges in parts:
        source, first = single(part.asnumpy()), 0
        for start, stop in ranges:
            factors[start:stop] = source[first : first + stop - start] / divisors[start:stop]
            first += stop - start
    return Tensor.from_numpy(factors)


def scale_columns(x: Tensor, factors: Tensor) -> Tensor:
    """x [t, n] times factors [n], in the dtype of x."""
    rows, column_factors = x.asnumpy(), factors.asnumpy()
    result, values = empty(*x.shape, dtype=x.dtype)

    def run(part: slice) -> None:
        values[part] = single(rows[part]) * column_factors

    split_work(run, len(rows), rows.size)
    return result


def dot_columns(x: Tensor, y: Tensor) -> Tensor:
    """The sums over t of x * y, both [t, n]: fp32 [n]."""
    left, right = x.asnumpy(), y.asnumpy()
    parts = split_work(
        lambda part: np.einsum("tn,tn->n", single(left[part]), single(right[part])), len(left), left.size
    )
    return Tensor.from_numpy(sum(parts[1:], parts[0]))
