"""What a CPU computes layers of experts with: one expert after the other.

Shapes: t tokens, h hidden size, E experts, k of them for a token, f inner width of an expert, n rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tandem.backends.torch.compute.cpu import add_product, product, swiglu, swiglu_backward

FEW_ROWS = 8  # of a product that takes as long as its weight takes to be read


def groups(counts: torch.Tensor) -> list[int]:
    """What the products need to know, from the number of rows of each expert [E]."""
    return counts.tolist()


def counts_of(ends: torch.Tensor) -> list[int]:
    """Rows of each expert, from where its rows end. The host waits for a device that has them."""
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def parts(groups: Sequence[int]) -> list[list[int]]:
    """One expert at a time: its rows stay in the caches from one product to the next, and need little memory."""
    return [[count] for count in groups]


def grouped_product(
    x: torch.Tensor, weight: torch.Tensor, groups: Sequence[int], *, transposed: bool = False
) -> torch.Tensor:
    """Each expert's rows of x [n, i] times its weight: [n, o].

    Args:
        weight: of all experts, [E o, i], one below the other; with `transposed`, [E i, o], and its transpose counts.
        groups: rows of each expert.
    """
    size = len(weight) // len(groups)
    result = x.new_empty(len(x), weight.shape[1] if transposed else size)
    first = 0
    for expert, count in enumerate(groups):
        if count:
            part = weight[expert * size : (expert + 1) * size]
            _multiply(x[first : first + count], part if transposed else part.t(), result[first : first + count])
            first += count
    return result


def _multiply(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    """x times w. oneDNN packs w again for each product, which takes long next to the products of a few hundred rows."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) <= FEW_ROWS:
        out.copy_(product(x, w.t()))
    else:
        torch.mm(x, w, out=out)


def add_grouped_product(
    target: torch.Tensor, first: bool, gradient: torch.Tensor, x: torch.Tensor, groups: Sequence[int]
) -> None:
    """Add each expert's gradient^T x to its part of target [E o, i]; `first` overwrites. gradient [n, o], x [n, i]."""
    row = 0
    for block, count in zip(target.chunk(len(groups)), groups):
        rows = slice(row, row + count)
        if count and x.dtype == torch.float32:  # in place: with few rows, a copy takes as long as the product
            torch.addmm(block, gradient[rows].t(), x[rows], beta=0.0 if first else 1.0, out=block)
        elif count:
            add_product(block, first, gradient[rows], x[rows], 1.0)
        elif first:
            block.zero_()
        row += count


def weighted_swiglu(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """x [n, 2f], gate then up, factors [n, 1] -> factor * silu(gate) * up, [n, f]."""
    return swiglu(x).mul_(factors)


def weighted_swiglu_backward(
    gradient: torch.Tensor, x: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x and, fp32, of the factors, and what `weighted_swiglu` gave."""
    active = swiglu(x)
    d_factors = (gradient * active).sum(1, keepdim=True, dtype=torch.float32)
    dx = swiglu_backward((gradient * factors).to(x.dtype), x)
    return dx, d_factors, active.mul_(factors)


def route(
    logits: torch.Tensor, chosen: torch.Tensor, tokens: int, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a router's fp32 logits [t, E] give for the chosen experts [t, k].

    Args:
        tokens: how many are no padding.
        normalise: each token's factors sum to 1.

    Returns:
        Factors [t, k]; probabilities [t, E]; log-sum-exp of the logits [t, 1]. And over the first `tokens`: how many
        chose each expert, fp32 [E], the sums of their probabilities [E], the sum of the squares of log-sum-exp.
    """
    probabilities, total = torch.softmax(logits, 1), torch.logsumexp(logits, 1, keepdim=True)
    factors = probabilities.gather(1, chosen)
    if normalise:
        factors = factors / factors.sum(1, keepdim=True)
    flat = chosen[:tokens].flatten()
    # Not `bincount`, for which Ascend's devices would wait.
    counts = logits.new_zeros(logits.shape[1]).scatter_add_(0, flat, logits.new_ones(len(flat)))
    return factors, probabilities, total, counts, probabilities[:tokens].sum(0), total[:tokens].square().sum()


def route_backward(
    gradient: torch.Tensor,
    probabilities: torch.Tensor,
    total: torch.Tensor,
    chosen: torch.Tensor,
    slopes: torch.Tensor,
    slope_of_z: torch.Tensor,
    tokens: int,
    normalise: bool,
) -> torch.Tensor:
    """The gradient of the logits, fp32 [t, E], from that of the factors [t, k] and those of the balancing losses.

    Args:
        total: log-sum-exp of the logits, [t, 1].
        slopes: the gradient of a loss with respect to the probabilities of each of the first `tokens`, [E] or [1].
        slope_of_z: that of the squares of `total`, with no dimensions.
    """
    d_chosen = gradient.float()
    if normalise:
        picked = probabilities.gather(1, chosen)
        picked_sum = picked.sum(1, keepdim=True)
        d_chosen = (d_chosen - (d_chosen * picked).sum(1, keepdim=True) / picked_sum) / picked_sum
    d_probabilities = torch.zeros_like(probabilities).scatter_(1, chosen, d_chosen)
    d_probabilities[:tokens] += slopes
    d_logits = probabilities * (d_probabilities - (d_probabilities * probabilities).sum(1, keepdim=True))
    d_logits[:tokens] += probabilities[:tokens] * (2 * slope_of_z * total[:tokens])
    return d_logits


def sum_rows(
    blocks: Iterable[torch.Tensor], owners: torch.Tensor, places: torch.Tensor, first: int, tokens: int
) -> torch.Tensor:
    """The sum of each token's rows [n, h]: [tokens, h]; zeros for a token without any.

    Args:
        blocks: the rows, some at a time.
        owners: the token of each row, [n].
        places: the rows of each token that has any, [n / k, k].
        first: the first token that has any; those after it follow.
    """
    result, row = None, 0
    for x in blocks:
        if result is None:
            result = x.new_zeros(tokens, x.shape[1])
        result.index_add_(0, owners[row : row + len(x)], x)
        row += len(x)
    assert result is not None, "no blocks"
    return result
