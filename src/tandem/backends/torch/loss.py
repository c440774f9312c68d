"""The output head and its cross-entropy, in chunks of rows: the logits of a long batch never exist at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import record_function

from tandem.backends.loss import chunks
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.functional import Weight, matmul
from tandem.backends.torch.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class Targets:
    """What the loss needs besides logits, of the rows that count.

    Attributes:
        labels: [t].
        weights: in the loss, [t, 1], in the dtype of long sums; empty in evaluation.
        scale, shares: the same as one factor times shares between -1 and 1, [t, 1] (`split_scale`).
    """

    labels: torch.Tensor
    weights: torch.Tensor
    scale: float
    shares: torch.Tensor


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor,
    head: Weight,
    targets: Targets,
    tensor: TensorParallel | None = None,
    most_likely: np.ndarray | None = None,
) -> np.ndarray:
    """-log softmax(hidden head^T)[label] of each row, fp32 [t]: hidden [t, h], head [vocabulary, h].

    With `tensor`, `head` is this rank's slice of the vocabulary, and all tensor ranks get the losses. `most_likely`,
    int64 [t], gets the most likely token of each row; of equally likely ones the first.
    """
    losses = []
    for rows in _chunks(hidden, head, tensor):
        logits = matmul(hidden[rows], head)
        if most_likely is not None:
            most_likely[rows] = _largest(logits, tensor).cpu().numpy()
        losses.append(_losses_and_gradient(logits, targets.labels[rows], tensor)[0])
    return torch.cat(losses)[:, 0].cpu().numpy()


@torch.no_grad()
@record_function("loss")
def cross_entropy_and_gradient(
    hidden: torch.Tensor,
    head: Weight,
    targets: Targets,
    tensor: TensorParallel | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the rows' losses times their weights, and its gradient with respect to `hidden`, [t, h].

    With `tensor`, the gradient is this rank's part of a sum over ranks. The head's gradient is added to
    `head.main_grad`. Nothing is read back from the device.
    """
    dhidden = torch.empty_like(hidden)
    column, shares = targets.weights, targets.shares.to(hidden.dtype)

    def run(rows: slice) -> torch.Tensor:
        losses, dlogits = _losses_and_gradient(matmul(hidden[rows], head), targets.labels[rows], tensor)
        dlogits = dlogits.to(hidden.dtype)
        # Weights are applied to the head's input and output, whose rows are shorter than logits.
        if head.main_grad is not None:
            head.main_grad.add_product(dlogits, hidden[rows] * shares[rows], targets.scale)
        torch.mul(matmul(dlogits, head.t()), column[rows].float(), out=dhidden[rows])
        return torch.sum(losses.to(column.dtype) * column[rows])

    return sum(map(run, _chunks(hidden, head, tensor)), column.new_zeros(())), dhidden


def _chunks(hidden: torch.Tensor, head: Weight, tensor: TensorParallel | None) -> list[slice]:
    """Chunks of rows, the same on all tensor ranks. No rows make one empty chunk.

    So the head has a gradient wherever another data rank has one.
    """
    vocabulary = head.shape[0] if tensor is None else tensor.vocabulary_rows
    return chunks(len(hidden), vocabulary, kernels_of(hidden.device).logits_chunk_bytes) or [slice(0, 0)]


def _losses_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, tensor: TensorParallel | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's loss, [t, 1], and the gradient of their sum with respect to the logits (softmax - onehot); fp32.

    The logits may be overwritten.
    """
    if tensor is not None:
        return _over_ranks(logits.float(), labels, tensor)
    return kernels_of(logits.device).losses_and_gradient(logits, labels)


def _over_ranks(
    logits: torch.Tensor, labels: torch.Tensor, tensor: TensorParallel
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for logits [t, this rank's rows of the vocabulary], which are overwritten."""
    labels, absent = tensor.outside(labels, logits.shape[1])
    logits.sub_(tensor.maximum(logits.max(dim=1, keepdim=True).values))
    label_logits = logits.gather(1, labels[:, None]).masked_fill_(absent[:, None], 0.0)
    exponentials = logits.exp_()
    sums = tensor.sum(torch.cat([exponentials.sum(1, keepdim=True), label_logits], dim=1))
    totals, label_logits = sums.split(1, dim=1)
    losses = totals.log() - label_logits
    probabilities = exponentials.div_(totals)
    probabilities.scatter_add_(1, labels[:, None], absent[:, None].to(probabilities.dtype).sub_(1.0))
    return losses, probabilities


def _largest(logits: torch.Tensor, tensor: TensorParallel | None) -> torch.Tensor:
    """The token with each row's largest logit, int64 [t]; the first of equal ones."""
    places = logits.argmax(dim=1)
    if tensor is None:
        return places
    peaks = logits.gather(1, places[:, None])[:, 0].float()
    has_largest = peaks == tensor.maximum(peaks.clone())
    # fp32 holds the ids exactly, and every backend has a maximum of it
    ids = (-places - tensor.first_row).float().masked_fill_(~has_largest, -float("inf"))
    return (-tensor.maximum(ids)).long()
