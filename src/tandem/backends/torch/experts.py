"""A layer's experts: a router chooses some for each token, and their outputs are summed with its factors.

Tokens are sorted by expert, so that each expert multiplies consecutive rows. No token is dropped.

Shapes: t tokens, h hidden size, E experts, k of them for a token, f inner width of an expert, n = t k rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import Function

from tandem.backends.experts import Dispatch, Routing, Share
from tandem.backends.torch.communication import Ranks, exchange, gather_counts
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.functional import Weight, matmul
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts


class HasRouting(Protocol):
    """A micro-batch on the device."""

    @property
    def routing(self) -> Routing | None: ...


@dataclass(frozen=True)
class ExpertRanks:
    """The ranks that share the experts of a layer, and the tokens that this rank sends to them."""

    experts: Ranks = field(default_factory=Ranks)
    share: Share = field(default_factory=Share)


class OfExperts(Weight):
    """A weight of experts. Other ranks hold copies of it than of other weights."""


class _Weighted(nn.Module):
    """A weight under its name in the layout."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device, kind: type[Weight] = Weight) -> None:
        super().__init__()
        self.weight = kind(torch.empty(shape, dtype=dtype, device=device))


class _Stacks(nn.Module):
    """Both weights of all experts, one expert below the other."""

    def __init__(self, hidden: int, experts: Experts, held: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        width = experts.moe_ffn_hidden_size
        self.linear_fc1 = _Weighted(held * 2 * width, hidden, dtype=dtype, device=device, kind=OfExperts)
        self.linear_fc2 = _Weighted(held * hidden, width, dtype=dtype, device=device, kind=OfExperts)


class MixtureOfExperts(nn.Module):
    """Takes the place of an MLP.

    Args:
        config: with this rank's width of an expert.
        layer: its number in the whole model.
    """

    def __init__(
        self, config: ModelConfig, layer: int, ranks: ExpertRanks, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        assert config.experts is not None
        self.layer, self.choice, self.ranks = layer, config.experts, ranks
        self.router = _Weighted(config.experts.num_experts, config.hidden_size, dtype=dtype, device=device)
        held = config.experts.num_experts // ranks.experts.size
        self.experts = _Stacks(config.hidden_size, config.experts, held, dtype, device)

    def forward(self, x: torch.Tensor, inputs: HasRouting) -> torch.Tensor:
        factors, chosen = _Route.apply(x, self.router.weight, self.choice, inputs.routing, self.layer)
        assert inputs.routing is not None
        rows = _Rows.of(chosen, self.choice.num_experts, inputs.routing.tokens, self.ranks)
        return _Mixture.apply(x, factors, self.experts.linear_fc1.weight, self.experts.linear_fc2.weight, rows)


def choose(logits: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All probabilities [t, E], the chosen experts [t, k], and their factors [t, k], from fp32 logits [t, E].

    Of experts with equal logits, those with the lower numbers are chosen.
    """
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    chosen = order[:, : experts.moe_router_topk].contiguous()
    probabilities = torch.softmax(logits, dim=1)
    factors = probabilities.gather(1, chosen)
    if experts.norm_topk_prob:
        factors = factors / factors.sum(1, keepdim=True)
    return probabilities, chosen, factors


class _Route(Function):
    """x [t, h] -> factors [t, k] and numbers of experts [t, k]. Its backward pass adds the balancing losses."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Weight, experts: Experts, routing: Routing, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = routing.settings.moe_router_dtype == "fp32"
        logits = (matmul(x.float(), weight.float()) if exact else matmul(x, weight)).float()
        probabilities, chosen, factors = choose(logits, experts)
        log_sum_exp = torch.logsumexp(logits, 1)
        real = slice(0, routing.tokens)
        routing.counts[layer] = torch.bincount(chosen[real].flatten(), minlength=experts.num_experts).float()
        routing.mass[layer] = probabilities[real].sum(0)
        routing.squares[layer] = log_sum_exp[real].square().sum()
        ctx.save_for_backward(x, probabilities, chosen, log_sum_exp)
        ctx.weight, ctx.experts, ctx.routing, ctx.layer = weight, experts, routing, layer
        ctx.mark_non_differentiable(chosen)
        return (factors if exact else factors.to(x.dtype)), chosen

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, probabilities, chosen, log_sum_exp = ctx.saved_tensors
        routing, weight = ctx.routing, ctx.weight
        d_chosen = gradient.float()
        if ctx.experts.norm_topk_prob:
            picked = probabilities.gather(1, chosen)
            total = picked.sum(1, keepdim=True)
            d_chosen = (d_chosen - (d_chosen * picked).sum(1, keepdim=True) / total) / total
        d_probabilities = torch.zeros_like(probabilities).scatter_(1, chosen, d_chosen)
        slopes = routing.slopes(ctx.layer)
        if slopes is not None:
            d_probabilities[: routing.tokens] += slopes
        d_logits = probabilities * (d_probabilities - (d_probabilities * probabilities).sum(1, keepdim=True))
        if routing.slope_of_z:
            real = slice(0, routing.tokens)
            d_logits[real] += probabilities[real] * (2 * routing.slope_of_z * log_sum_exp[real, None])
        d_logits = d_logits.to(x.dtype)
        if weight.main_grad is not None:
            weight.main_grad.add_product(d_logits, x)
        return matmul(d_logits, weight.t()), None, None, None, None


@dataclass(frozen=True)
class _Rows:
    """Tokens sorted by expert: expert after expert, and each expert's tokens in their order.

    Attributes:
        slots: of each row, which of the t k choices it is: token times k, plus the place among the token's experts.
        tokens: of each row, the number of its token.
        counts: rows that come to each of this rank's experts.
        dispatch, order: how rows travel; None where this rank has all experts.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    counts: list[int]
    ranks: Ranks
    dispatch: Dispatch | None = None
    order: torch.Tensor | None = None

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int, tokens: int, ranks: ExpertRanks) -> _Rows:
        """Of the experts of each token, [t, k]: those of this rank's share of the first `tokens` tokens."""
        first, last = ranks.share.rows(tokens)
        flat, width = chosen[first:last].flatten(), chosen.shape[1]
        slots = torch.sort(flat, stable=True).indices + first * width
        counts = torch.bincount(flat, minlength=experts)
        numbers = torch.div(slots, width, rounding_mode="floor")
        if ranks.experts.group is None:
            return cls(slots, numbers, counts.tolist(), ranks.experts)
        dispatch = Dispatch.of(gather_counts(counts, ranks.experts), ranks.experts.rank)
        order = torch.from_numpy(dispatch.order).to(chosen.device)
        return cls(slots, numbers, dispatch.counts, ranks.experts, dispatch, order)

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of this rank's tokens -> the rows that come to its experts, sorted by these."""
        if self.dispatch is None:
            return x
        return exchange(x, self.dispatch.send, self.dispatch.receive, self.ranks)[self.order]

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `there`."""
        if self.dispatch is None:
            return x
        as_they_came = torch.empty_like(x)
        as_they_came[self.order] = x
        return exchange(as_they_came, self.dispatch.receive, self.dispatch.send, self.ranks)


class _Mixture(Function):
    """sum over a token's experts of factor * W2 (silu(gate) * up), with (gate, up) = W1 x: x [t, h] -> [t, h].

    The factor is applied before W2, as in Megatron: there a row has f numbers, and not h.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, factors: torch.Tensor, fc1: Weight, fc2: Weight, rows: _Rows
    ) -> torch.Tensor:
        taken, factor = rows.there(x[rows.tokens]), rows.there(factors.flatten()[rows.slots, None])
        gate_up = grouped(taken, fc1, rows.counts)
        down = grouped((kernels_of(x.device).swiglu(gate_up) * factor).to(x.dtype), fc2, rows.counts)
        # What other ranks sent is kept. What this rank took itself is taken again.
        kept = (taken, factor) if rows.dispatch is not None else ()
        ctx.save_for_backward(x, factors, gate_up, *kept)
        ctx.weights, ctx.rows = (fc1, fc2), rows
        return torch.zeros_like(x).index_add_(0, rows.tokens, rows.back(down))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, factors, gate_up, *kept = ctx.saved_tensors
        (fc1, fc2), rows = ctx.weights, ctx.rows
        taken, factor = kept or (x[rows.tokens], factors.flatten()[rows.slots, None])
        kernels = kernels_of(x.device)
        d_down, active = rows.there(gradient[rows.tokens]), kernels.swiglu(gate_up)
        if fc2.main_grad is not None:
            fc2.main_grad.add_products(d_down, (active * factor).to(x.dtype), rows.counts)
        d_weighted = grouped(d_down, fc2, rows.counts, transposed=True)
        d_factors = torch.zeros_like(factors)
        dots = (d_weighted * active).sum(1, keepdim=True).to(factors.dtype)
        d_factors.view(-1)[rows.slots] = rows.back(dots)[:, 0]
        d_gate_up = kernels.swiglu_backward((d_weighted * factor).to(x.dtype), gate_up)
        if fc1.main_grad is not None:
            fc1.main_grad.add_products(d_gate_up, taken, rows.counts)
        d_rows = rows.back(grouped(d_gate_up, fc1, rows.counts, transposed=True))
        return torch.zeros_like(x).index_add_(0, rows.tokens, d_rows), d_factors, None, None, None


def grouped(x: torch.Tensor, weight: torch.Tensor, counts: list[int], *, transposed: bool = False) -> torch.Tensor:
    """Each expert's rows of x [n, i] times its weight: [n, o].

    Args:
        weight: of all experts, [E o, i], one below the other; with `transposed`, [E i, o], and its transpose counts.
        counts: rows of each expert.
    """
    size = len(weight) // len(counts)
    result = x.new_empty(len(x), weight.shape[1] if transposed else size)
    first = 0
    for expert, count in enumerate(counts):
        if count:
            part = weight[expert * size : (expert + 1) * size]
            result[first : first + count] = matmul(x[first : first + count], part.t() if transposed else part)
            first += count
    return result
