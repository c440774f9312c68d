"""The output head with cross-entropy on Ascend NPUs, in chunks of rows. Nothing is read back in training.

Written from MindSpore's documentation; there was no NPU to run it on. The CPU's functions document each of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from tandem.backends.loss import chunks
from tandem.backends.mindspore.compute.npu import product, weight_gradient
from tandem.backends.mindspore.documents import Targets
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Weight
from tandem.frameworks import MINDSPORE


def token_losses(
    hidden: Tensor, head: Weight, targets: Targets, tensor: TensorParallel, most_likely: np.ndarray | None = None
) -> np.ndarray:
    losses = []
    for rows in _chunks(hidden, tensor):
        logits = _logits(hidden[rows], head)
        if most_likely is not None:
            largest, places = mint.max(logits, -1)
            most_likely[rows] = tensor.first_largest(largest.asnumpy(), places.asnumpy())
        losses.append(_losses_and_gradient(logits, targets.part(rows), tensor)[0])
    return mint.cat(losses, 0).asnumpy()[:, 0] if losses else np.empty(0, np.float32)


def cross_entropy_and_gradient(
    hidden: Tensor, head: Weight, targets: Targets, tensor: TensorParallel
) -> tuple[Tensor, Tensor]:
    """The same as the CPU's, but the loss stays on the device."""
    total, gradients = mint.zeros((), dtype=ms.float32), []
    for rows in _chunks(hidden, tensor):
        part, of_chunk = hidden[rows], targets.part(rows)
        losses, d_logits = _losses_and_gradient(_logits(part, head), of_chunk, tensor)
        total = total + mint.sum(losses * of_chunk.shares)
        # Weighted only behind products, so that the loss scale does not reduce the range of fp16.
        d_logits = d_logits.astype(hidden.dtype)
        column = of_chunk.shares * targets.scale
        gradients.append((product(d_logits, head.value) * column).astype(hidden.dtype))
        if head.trained:
            weighted = part * of_chunk.shares.astype(hidden.dtype)
            head.add_gradient(weight_gradient(d_logits, weighted).astype(ms.float32) * targets.scale)
    return total * targets.scale, mint.cat(gradients, 0) if gradients else hidden  # without rows, as the gradient


def _chunks(hidden: Tensor, tensor: TensorParallel) -> Iterator[slice]:
    yield from chunks(hidden.shape[0], tensor.vocabulary_rows, MINDSPORE.device_logits_chunk_bytes)


def _logits(hidden: Tensor, head: Weight) -> Tensor:
    return product(hidden, head.value, transpose_b=True).astype(ms.float32)


def _losses_and_gradient(logits: Tensor, targets: Targets, tensor: TensorParallel) -> tuple[Tensor, Tensor]:
    """Each row's loss, [n, 1], and the gradient of their sum with respect to the logits; fp32.

    At most two tensors of the size of the logits are there at a time (`MINDSPORE.device_logits_bytes`).
    """
    labels = targets.local.reshape(-1, 1)
    if targets.present is None:
        log_probabilities = mint.nn.functional.log_softmax(logits, -1)
        losses = -mint.gather(log_probabilities, 1, labels)
        return losses, log_probabilities.exp_().scatter_add_(1, labels, _minus_ones(labels))
    shifted = logits - tensor.ranks.maximum(mint.max(logits, -1, keepdim=True)[0])
    label_logits = mint.gather(shifted, 1, labels) * targets.present
    exponentials = shifted.exp_()
    sums = tensor.ranks.sum(mint.cat([mint.sum(exponentials, -1, keepdim=True), label_logits], 1))
    totals, label_logits = sums[:, :1], sums[:, 1:]
    losses = mint.log(totals) - label_logits
    return losses, exponentials.div_(totals).scatter_add_(1, labels, -targets.present)


def _minus_ones(labels: Tensor) -> Tensor:
    return mint.full(labels.shape, -1.0, dtype=ms.float32)
