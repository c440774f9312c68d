"""The output head and its cross-entropy, in chunks of rows, so that the logits of a long batch never exist at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tandem.backends.torch.functional import Weight, matmul

LOGITS_CHUNK_BYTES = 64 * 2**20


@torch.no_grad()
def cross_entropy(hidden: torch.Tensor, head: Weight, labels: torch.Tensor) -> float:
    """Sum of -log softmax(hidden head^T)[label] over rows: hidden [t, h], head [vocabulary, h], labels [t]."""
    return sum(_losses_and_probabilities(hidden[rows], head, labels[rows])[0] for rows in _chunks(hidden, head))


@torch.no_grad()
def cross_entropy_and_gradient(
    hidden: torch.Tensor, head: Weight, labels: torch.Tensor, scale: float
) -> tuple[float, torch.Tensor]:
    """The sum of the losses, and the gradient of `scale` times it with respect to `hidden`, [t, h].

    The head's gradient is added to `head.main_grad` on the way: each chunk's logits become their own gradient while
    they are there.
    """
    dhidden = torch.empty_like(hidden)
    losses = [
        _backward_of_chunk(hidden[rows], head, labels[rows], scale, dhidden[rows]) for rows in _chunks(hidden, head)
    ]
    return sum(losses), dhidden


def _backward_of_chunk(
    hidden: torch.Tensor, head: Weight, labels: torch.Tensor, scale: float, dhidden: torch.Tensor
) -> float:
    """Fill `dhidden`, add to the head's gradient, return the sum of the losses."""
    loss, probabilities = _losses_and_probabilities(hidden, head, labels)
    probabilities.scatter_add_(1, labels[:, None], probabilities.new_full((1, 1), -1.0).expand(len(labels), 1))
    dlogits = probabilities.to(hidden.dtype)
    if head.main_grad is not None:
        head.main_grad.add_product(dlogits, hidden, scale)
    torch.mul(matmul(dlogits, head.t()), scale, out=dhidden)
    return loss


def _chunks(hidden: torch.Tensor, head: Weight) -> Iterator[slice]:
    """Rows whose fp32 logits fit LOGITS_CHUNK_BYTES, evenly divided."""
    limit = max(1, LOGITS_CHUNK_BYTES // (4 * head.shape[0]))
    chunks = -(-len(hidden) // limit)
    for chunk in range(chunks):
        yield slice(chunk * len(hidden) // chunks, (chunk + 1) * len(hidden) // chunks)


def _losses_and_probabilities(hidden: torch.Tensor, head: Weight, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The sum of the rows' losses, and softmax(hidden head^T), fp32."""
    logits = matmul(hidden, head).float()
    wanted = logits.gather(1, labels[:, None])
    peak, where = logits.max(dim=1, keepdim=True)
    probabilities = torch.softmax(logits, dim=1, out=logits)
    # log sum exp(logits) = peak - log softmax(peak), which is exact to rounding: the peak's share is never tiny.
    losses = peak - probabilities.gather(1, where).log_() - wanted
    return losses.sum(dtype=torch.float64).item(), probabilities
