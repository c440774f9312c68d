"""The output head with cross-entropy on CPU, in chunks of rows and pieces of the vocabulary.

Logits of a chunk are overwritten by their gradient. So the logits of a long batch never exist at once, and neither does
a second tensor of the head's size. With fp16, input and output are fp16, and everything in between is fp32.
"""

from __future__ import annotations

import functools

import numpy as np
from mindspore import Tensor

from tandem.backends.loss import chunks
from tandem.backends.mindspore.compute.cpu.products import matmul
from tandem.backends.mindspore.compute.cpu.threads import split_work
from tandem.backends.mindspore.documents import Targets
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Weight, empty, single, written_in_single
from tandem.frameworks import MINDSPORE

LOGITS_CHUNK_BYTES = MINDSPORE.logits_chunk_bytes
# Vocabulary entries multiplied at a time: a piece of the logits, and of the head's gradient, stays in cache.
PIECE = 4096


def token_losses(
    hidden: Tensor, head: Weight, targets: Targets, tensor: TensorParallel, most_likely: np.ndarray | None = None
) -> np.ndarray:
    """-log softmax(hidden head^T)[label] of each row, fp32 [n]: hidden [n, h], head [v, h].

    Where ranks share the vocabulary, `head` is this rank's part of it, and all ranks get the losses. `most_likely`,
    int64 [n], gets the most likely token of each row; of equally likely ones the first.
    """
    rows = hidden.asnumpy()
    losses = np.empty(len(rows), np.float32)
    for part in chunks(len(rows), tensor.vocabulary_rows, LOGITS_CHUNK_BYTES):
        chunk = _Chunk(single(rows[part]), head, targets.labels[part], tensor, finds=most_likely is not None)
        losses[part] = chunk.losses
        if most_likely is not None:
            most_likely[part] = tensor.first_largest(*chunk.largest_logits())
    return losses


def cross_entropy_and_gradient(
    hidden: Tensor, head: Weight, targets: Targets, tensor: TensorParallel
) -> tuple[float, Tensor]:
    """The sum of the rows' losses times their weights, and its gradient with respect to `hidden`, [n, h].

    Where ranks share the vocabulary, the gradient is this rank's part of a sum over ranks. The head's gradient is
    added to its buffer.
    """
    rows = hidden.asnumpy()
    d_hidden, d_rows = empty(*rows.shape, dtype=hidden.dtype)

    def run(part: slice) -> float:
        chunk = _Chunk(single(rows[part]), head, targets.labels[part], tensor)
        with written_in_single(d_rows[part]) as out:
            chunk.backward(targets.weights[part].astype(np.float32), out)
        return float(np.sum(chunk.losses * targets.weights[part]))

    return sum(run(part) for part in chunks(len(rows), tensor.vocabulary_rows, LOGITS_CHUNK_BYTES)), d_hidden


class _Chunk:
    """The logits of some rows, exponentiated: in each piece exp(logits - the row's largest in that piece).

    Args:
        finds: `largest_logits` will be asked for.
    """

    def __init__(
        self, rows: np.ndarray, head: Weight, labels: np.ndarray, tensor: TensorParallel, *, finds: bool = False
    ) -> None:
        self.hidden = Tensor.from_numpy(rows)
        self.head = head
        self.labels = tensor.local(labels)
        size = head.value.shape[0]
        self.ranges = [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
        shape = (len(rows), len(self.ranges))
        self.largest = np.empty(shape, np.float32)
        self.totals = np.empty(shape, np.float32)
        self.places = np.empty(shape, np.int64) if finds else None  # of the largest, in the piece
        label_logits = np.zeros(len(rows), np.float32)
        self.pieces = [self._exponentials(index, label_logits) for index in range(len(self.ranges))]
        top = self.largest.max(1)
        exponentials = self.totals * np.exp(self.largest - top[:, None])
        log_sum_exp = top + np.log(exponentials.sum(1))
        self.log_sum_exp, label_logits = tensor.softmax_over_ranks(log_sum_exp, label_logits)  # [rows]
        self.losses = self.log_sum_exp - label_logits  # fp32 [rows]

    def _exponentials(self, index: int, label_logits: np.ndarray) -> Tensor:
        piece = matmul(self.hidden, self._weights(index), transpose_b=True)
        logits = piece.asnumpy()
        here = self._labelled(index)
        label_logits[here] = logits[here, self.labels[here] - self.ranges[index].start]

        def exponentiate(part: slice) -> None:
            values = logits[part]
            values.max(1, out=self.largest[part, index])
            if self.places is not None:
                self.places[part, index] = values.argmax(1)
            values -= self.largest[part, index, None]
            np.exp(values, out=values)
            values.sum(1, out=self.totals[part, index])

        split_work(exponentiate, len(logits), logits.size)
        return piece

    def largest_logits(self) -> tuple[np.ndarray, np.ndarray]:
        """The largest logit of each row, and its number on this rank; the first of equal ones."""
        assert self.places is not None
        best, rows = self.largest.argmax(1), np.arange(len(self.largest))
        return self.largest[rows, best], PIECE * best + self.places[rows, best]

    def backward(self, weights: np.ndarray, d_rows: np.ndarray) -> None:
        """Write the gradient of the rows, and accumulate the head's. The pieces are overwritten."""
        factors = np.exp(self.largest - self.log_sum_exp[:, None]) * weights[:, None]
        d_head = self.head.gradient_rows() if self.head.trained else None
        for index, piece in enumerate(self.pieces):
            d_logits = piece.asnumpy()
            here = self._labelled(index)
            split_work(functools.partial(_scale_rows, d_logits, factors[:, index, None]), len(d_logits), d_logits.size)
            d_logits[here, self.labels[here] - self.ranges[index].start] -= weights[here]
            d_piece = matmul(piece, self._weights(index)).asnumpy()
            d_rows[...] = d_piece if index == 0 else d_rows + d_piece
            if d_head is not None:
                d_piece = matmul(piece, self.hidden, transpose_a=True).asnumpy()
                _accumulate(d_head[self.ranges[index]], d_piece, self.head.has_gradient)
        self.head.has_gradient = self.head.trained

    def _weights(self, index: int) -> Tensor:
        return Tensor.from_numpy(single(self.head.value.asnumpy()[self.ranges[index]]))

    def _labelled(self, index: int) -> np.ndarray:
        """Rows whose label lies in the piece."""
        here = self.ranges[index]
        return np.flatnonzero((self.labels >= here.start) & (self.labels < here.stop))


def _scale_rows(values: np.ndarray, factors: np.ndarray, part: slice) -> None:
    np.multiply(values[part], factors[part], out=values[part])


def _accumulate(buffer: np.ndarray, values: np.ndarray, has_contents: bool) -> None:
    def run(part: slice) -> None:
        if has_contents:
            buffer[part] += values[part]
        else:
            buffer[part] = values[part]

    split_work(run, len(buffer), buffer.size)
