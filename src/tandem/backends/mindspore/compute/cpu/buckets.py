"""Collectives over many tensors on CPU, through buckets: few messages, and little memory for copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.compute.cpu.functional import rows
from tandem.backends.mindspore.weight import Weight, empty
from tandem.parallel.layout import even_rows

# Elements of a message: large enough to be fast, small enough for the five copies that a gathering needs.
BUCKET = 2**22


def sum_over(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the ranks, in place."""
    flat = [tensor.asnumpy().reshape(-1) for tensor in tensors]
    pieces = (values[start : start + BUCKET] for values in flat for start in range(0, len(values), BUCKET))
    for bucket in _buckets((piece,) for piece in pieces):
        message, values = empty(sum(len(piece) for (piece,) in bucket))
        np.concatenate([piece for (piece,) in bucket], out=values)
        _unpack(ranks.sum(message).asnumpy(), [piece for (piece,) in bucket])


def gather_rows(ranks: Ranks, weights: Sequence[Weight]) -> None:
    """Send this rank's rows (`even_rows`) of each weight to every rank: the masters, in the dtype of the values."""
    for bucket in _buckets(piece for weight in weights for piece in _pieces(weight, ranks.size)):
        # The first rank has the most rows. On other ranks, the end of a message may be undefined.
        sizes = [len(piece[0]) for piece in bucket]
        message, values = empty(sum(sizes), dtype=weights[0].value.dtype)
        for master, start in zip((piece[-1] for piece in bucket), np.cumsum([0, *sizes])):
            values[start : start + len(master)] = master
        for rank, rank_message in enumerate(ranks.gather(message)):
            _unpack(rank_message.asnumpy(), [piece[rank] for piece in bucket], sizes)


def scatter_rows(ranks: Ranks, x: Tensor) -> Tensor:
    """This rank's rows (`even_rows`) of the sum of the ranks' x. MindSpore has no ReduceScatter on CPU."""
    return rows(ranks.sum(x), *even_rows(x.shape[0], ranks.size, ranks.rank))


def _pieces(weight: Weight, size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Flat pieces of a bucket's size: of the value, a piece of each rank's rows; last, that of this rank's master."""
    values = weight.value.asnumpy()
    step = -(-len(values) // size)
    chunks = [values[rank * step : (rank + 1) * step].reshape(-1) for rank in range(size)]
    chunks.append(weight.master.asnumpy().reshape(-1))
    for start in range(0, len(chunks[0]), BUCKET):
        yield tuple(chunk[start : start + BUCKET] for chunk in chunks)


def _buckets(pieces: Iterable[tuple[np.ndarray, ...]]) -> Iterator[list[tuple[np.ndarray, ...]]]:
    """Groups of consecutive pieces. The first arrays of a group's pieces fit into one bucket."""
    bucket: list[tuple[np.ndarray, ...]] = []
    size = 0
    for piece in pieces:
        if bucket and size + len(piece[0]) > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += len(piece[0])
    if bucket:
        yield bucket


def _unpack(values: np.ndarray, pieces: Sequence[np.ndarray], sizes: Sequence[int] | None = None) -> None:
    """Write consecutive values into the pieces. Each takes its entry of `sizes`; None: its length."""
    start = 0
    for piece, size in zip(pieces, sizes or [len(piece) for piece in pieces]):
        piece[...] = values[start : start + len(piece)]
        start += size
