"""Collectives over many tensors on CPU, through buckets: few messages, and little memory beside the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.weight import Weight, empty

# Elements of a message: large enough for the speed, small enough for the five of it that a gathering takes.
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
    """Give every rank the rows of each weight that `even_rows` gives this one: its masters, in the values' dtype."""
    for bucket in _buckets(piece for weight in weights for piece in _pieces(weight, ranks.size)):
        # The first rank's rows are the most; on the others the end of a message may be without meaning.
        sizes = [len(piece[0]) for piece in bucket]
        message, values = empty(sum(sizes), dtype=weights[0].value.dtype)
        for own, start in zip((piece[-1] for piece in bucket), np.cumsum([0, *sizes])):
            values[start : start + len(own)] = own
        for rank, found in enumerate(ranks.gather(message)):
            _unpack(found.asnumpy(), [piece[rank] for piece in bucket], sizes)


def _pieces(weight: Weight, size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Parts of a bucket's size, flat: the same part of each rank's rows of the value, and of this rank's master."""
    rows = weight.value.asnumpy()
    step = -(-len(rows) // size)
    chunks = [rows[rank * step : (rank + 1) * step].reshape(-1) for rank in range(size)]
    chunks.append(weight.master.asnumpy().reshape(-1))
    for start in range(0, len(chunks[0]), BUCKET):
        yield tuple(chunk[start : start + BUCKET] for chunk in chunks)


def _buckets(pieces: Iterable[tuple[np.ndarray, ...]]) -> Iterator[list[tuple[np.ndarray, ...]]]:
    """Consecutive pieces whose first arrays fit a bucket together."""
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
    """Write consecutive values into the pieces, which take `sizes` (their own lengths when None) each."""
    start = 0
    for piece, size in zip(pieces, sizes or [len(piece) for piece in pieces]):
        piece[...] = values[start : start + len(piece)]
        start += size
