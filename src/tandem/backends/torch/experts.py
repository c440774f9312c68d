"""A layer's experts: a router chooses some for each token, and their outputs are summed with its factors.

Tokens are sorted by expert, so that each expert multiplies consecutive rows. No token is dropped, unless experts have a
capacity.

Shapes: t tokens, h hidden size, E experts, k of them for a token, f inner width of an expert, n = t k rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd import Function

from tandem.backends.adapters import LocalAdapter, Switch
from tandem.backends.capacity import Capacity
from tandem.backends.experts import Dispatch, Routing, Share
from tandem.backends.torch.adapters import Factors, attach, factors_of
from tandem.backends.torch.communication import Ranks, exchange, gather_counts
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.expert_adapters import RouterWeight, Stack
from tandem.backends.torch.functional import Weight, matmul
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts
from tandem.models.families import EXPERTS_FC1, EXPERTS_FC2, ROUTER
from tandem.models.tensors import layer_prefix


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
    """A weight, and its adapters, under their names in the layout.

    Args:
        experts: how many matrices it is made of, where it is that of experts; 0 otherwise.
    """

    def __init__(
        self,
        *shape: int,
        dtype: torch.dtype,
        device: torch.device,
        adapters: Sequence[LocalAdapter],
        switch: Switch,
        experts: int = 0,
    ) -> None:
        super().__init__()
        kind = OfExperts if experts else Weight
        self.weight = kind(torch.empty(shape, dtype=dtype, device=device))
        self.adapters, self.switch = adapters, switch
        if adapters:
            attach(self, self.weight, adapters, matrices=experts or 1)

    @property
    def factors(self) -> list[Factors]:
        """Of those adapters that take part."""
        return factors_of(self, self.adapters) if self.adapters and self.switch.on else []


class _Stacks(nn.Module):
    """Both weights of all experts, one expert below the other."""

    def __init__(self, linear_fc1: _Weighted, linear_fc2: _Weighted) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = linear_fc1, linear_fc2


class MixtureOfExperts(nn.Module):
    """Takes the place of an MLP.

    Args:
        config: with this rank's width of an expert.
        layer: its number in the whole model.
        adapters: this rank's, by the global name of the weight that they add to.
        switch: turns them on and off.
    """

    enters = False

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        ranks: ExpertRanks,
        dtype: torch.dtype,
        device: torch.device,
        adapters: Mapping[str, Sequence[LocalAdapter]],
        switch: Switch,
    ) -> None:
        super().__init__()
        assert config.experts is not None
        self.layer, self.choice, self.ranks = layer, config.experts, ranks

        def weighted(name: str, *shape: int, experts: int = 0) -> _Weighted:
            of_weight = adapters.get(layer_prefix(layer) + name, ())
            return _Weighted(*shape, dtype=dtype, device=device, adapters=of_weight, switch=switch, experts=experts)

        held, width = config.experts.num_experts // ranks.experts.size, config.experts.moe_ffn_hidden_size
        self.router = weighted(ROUTER, config.experts.num_experts, config.hidden_size)
        self.experts = _Stacks(
            weighted(EXPERTS_FC1, held * 2 * width, config.hidden_size, experts=held),
            weighted(EXPERTS_FC2, held * config.hidden_size, width, experts=held),
        )

    def forward(self, x: torch.Tensor, inputs: HasRouting) -> torch.Tensor:
        router = RouterWeight(self.router.weight, self.router.factors)
        factors, chosen = _Route.apply(x, router, self.choice, inputs.routing, self.layer)
        assert inputs.routing is not None
        factors = _limited(factors, chosen, inputs.routing, self.layer)
        rows = _Rows.of(chosen, self.choice.num_experts, inputs.routing.tokens, self.ranks)
        weights = (self.experts.linear_fc1, self.experts.linear_fc2)
        fc1, fc2 = (Stack(weight.weight, weight.factors) for weight in weights)
        return _Mixture.apply(x, factors, fc1, fc2, rows, *fc1.weights, *fc2.weights)


def likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The numbers of the `count` experts with the largest logits of [t, E]; of equal ones, the first."""
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :count].contiguous()


def _limited(factors: torch.Tensor, chosen: torch.Tensor, routing: Routing, layer: int) -> torch.Tensor:
    """The factors [t, k], with zeros for the choices that experts do not take."""
    if routing.capacity is None:
        return factors
    taken = taken_choices(routing.capacity, chosen, factors.detach(), routing.tokens)
    routing.taken[layer] = taken.sum()
    return factors * taken


def taken_choices(capacity: Capacity, chosen: torch.Tensor, factors: torch.Tensor, tokens: int) -> torch.Tensor:
    """`capacity.taken` on the device. Nothing is read from there."""
    result = torch.zeros_like(chosen, dtype=torch.bool)
    for first, last, limit in capacity.limits(tokens):
        flat = chosen[first:last].flatten()
        numbers = torch.arange(len(flat), device=flat.device)
        if capacity.by_probability:
            numbers = torch.sort(factors[first:last].flatten(), descending=True, stable=True).indices
        experts, order = torch.sort(flat[numbers], stable=True)
        places = torch.arange(len(flat), device=flat.device) - torch.searchsorted(experts, experts)
        result[first:last].view(-1)[numbers[order]] = places < limit
    return result


class _Route(Function):
    """x [t, h] -> factors [t, k] and numbers of experts [t, k]. Its backward pass adds the balancing losses."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: RouterWeight, experts: Experts, routing: Routing, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = routing.settings.moe_router_dtype == "fp32"
        values = weight.value(torch.float32 if exact else x.dtype)
        logits = matmul(x.to(values.dtype), values).float()
        chosen = likeliest(logits, experts.moe_router_topk)
        factors, probabilities, total, counts, mass, squares = kernels_of(x.device).route(
            logits, chosen, routing.tokens, experts.norm_topk_prob
        )
        routing.counts[layer], routing.mass[layer], routing.squares[layer] = counts, mass, squares
        ctx.save_for_backward(x, probabilities, total, chosen)
        ctx.weight, ctx.experts, ctx.routing, ctx.layer = weight, experts, routing, layer
        ctx.mark_non_differentiable(chosen)
        return (factors if exact else factors.to(x.dtype)), chosen

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, probabilities, total, chosen = ctx.saved_tensors
        routing, weight = ctx.routing, ctx.weight
        slopes = routing.slopes(ctx.layer)
        d_logits = (
            kernels_of(x.device)
            .route_backward(
                gradient,
                probabilities,
                total,
                chosen,
                total.new_zeros(1) if slopes is None else slopes,
                total.new_full((), routing.slope_of_z),
                routing.tokens,
                ctx.experts.norm_topk_prob,
            )
            .to(x.dtype)
        )
        weight.add_gradient(d_logits, x)
        return matmul(d_logits, weight.value(x.dtype).t()), None, None, None, None


class _Part(NamedTuple):
    """Some experts, which are computed together.

    Attributes:
        number: of the part.
        rows: theirs, of those that come to this rank.
        groups: as of `_Rows`.
    """

    number: int
    rows: slice
    groups: Any


@dataclass(frozen=True)
class _Rows:
    """Tokens sorted by expert: expert after expert, and each expert's tokens in their order.

    Attributes:
        slots: of each row, which of the t k choices it is: token times k, plus the place among the token's experts.
        owners: of each row, the number of its token.
        places: of each token that this rank sends, its rows, [tokens, k].
        first: the first token that this rank sends.
        groups: how the rows that come to this rank belong to its experts, in the device's form.
        dispatch: how rows travel; None where this rank has all experts.
    """

    slots: torch.Tensor
    owners: torch.Tensor
    places: torch.Tensor
    first: int
    groups: Any
    ranks: Ranks
    dispatch: Dispatch | None = None

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int, tokens: int, ranks: ExpertRanks) -> _Rows:
        """Of the experts of each token, [t, k]: those of this rank's share of the first `tokens` tokens."""
        first, last = ranks.share.rows(tokens)
        flat, width, device = chosen[first:last].flatten(), chosen.shape[1], chosen.device
        order = torch.sort(flat, stable=True).indices
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=device)
        slots = order + first * width
        rows = (slots, torch.div(slots, width, rounding_mode="floor"), places.view(-1, width), first)
        # Not `bincount`, which waits for the device.
        counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
        if ranks.experts.group is None:
            return cls(*rows, kernels_of(device).groups(counts), ranks.experts)
        dispatch = dispatch_of(gather_counts(counts, ranks.experts), ranks.experts.rank)
        return cls(*rows, kernels_of(device).groups(dispatch.counts), ranks.experts, dispatch)

    def parts(self) -> tuple[int, list[_Part]]:
        """How many parts the experts are computed in, and those of them that have rows, or one."""
        parts = kernels_of(self.slots.device).parts(self.groups)
        if len(parts) == 1:
            return 1, [_Part(0, slice(None), self.groups)]
        ends = list(accumulate(map(sum, parts)))
        found = [
            _Part(number, slice(end - sum(groups), end), groups)
            for number, (groups, end) in enumerate(zip(parts, ends))
            if sum(groups)
        ]
        return len(parts), found or [_Part(0, slice(0, 0), parts[0])]

    def sums(self, blocks: Iterable[torch.Tensor], tokens: int) -> torch.Tensor:
        """The sum of each token's rows [n, h], which come in blocks from the experts: [tokens, h]."""
        if self.dispatch is not None:
            blocks = [self.back(_joined(list(blocks)))]
        return kernels_of(self.slots.device).sum_rows(blocks, self.owners, self.places, self.first, tokens)

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of this rank's tokens -> the rows that come to its experts, sorted by these."""
        if self.dispatch is None:
            return x
        return exchange(x, self.dispatch.send, self.dispatch.receive, self.ranks)[self.dispatch.order]

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `there`."""
        if self.dispatch is None:
            return x
        as_they_came = torch.empty_like(x)
        as_they_came[self.dispatch.order] = x
        return exchange(as_they_came, self.dispatch.receive, self.dispatch.send, self.ranks)


def dispatch_of(rows: torch.Tensor, rank: int) -> Dispatch:
    """`Dispatch.of`, on the device. Only how many rows go between ranks is read: the exchange wants to know."""
    ranks, held = len(rows), rows.shape[1] // len(rows)
    here = rows[:, rank * held : (rank + 1) * held]
    between = rows.view(ranks, ranks, held).sum(2).cpu().numpy()
    received = between[:, rank]
    # Of each rank's rows for each expert, one after the other: where they end.
    ends = here.flatten().cumsum(0)
    numbers = torch.arange(int(received.sum()), device=rows.device)
    experts = torch.searchsorted(ends, numbers, right=True) % held
    order = torch.sort(experts, stable=True).indices
    return Dispatch(between[rank].tolist(), received.tolist(), order, here.sum(0), between)


class _Mixture(Function):
    """sum over a token's experts of factor * W2 (silu(gate) * up), with (gate, up) = W1 x: x [t, h] -> [t, h].

    The factor is applied before W2, as in Megatron: there a row has f numbers, and not h.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, factors: torch.Tensor, fc1: Stack, fc2: Stack, rows: _Rows, *_: Weight
    ) -> torch.Tensor:
        # What other ranks sent is kept. What this rank took itself is taken again.
        sent = () if rows.dispatch is None else (rows.there(x[rows.owners]), rows.there(_column(factors, rows.slots)))
        count, parts = rows.parts()
        first, second, kept = fc1.blocks(count), fc2.blocks(count), list[torch.Tensor]()

        def outputs() -> Iterator[torch.Tensor]:
            for part in parts:
                taken = sent[0][part.rows] if sent else x[rows.owners[part.rows]]
                factor = sent[1][part.rows] if sent else _column(factors, rows.slots[part.rows])
                gate_up, of_fc1 = first[part.number].product(taken, part.groups)
                weighted = kernels_of(x.device).weighted_swiglu(gate_up, factor)
                down, of_fc2 = second[part.number].product(weighted, part.groups)
                kept.extend([gate_up, *of_fc1, *of_fc2])
                yield down

        result = rows.sums(outputs(), len(x))
        ctx.save_for_backward(x, factors, *sent, *kept)
        ctx.weights, ctx.rows = (fc1, fc2), rows
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (fc1, fc2), rows, kernels = ctx.weights, ctx.rows, kernels_of(gradient.device)
        x, factors, *saved = ctx.saved_tensors
        sent, kept = ((), saved) if rows.dispatch is None else (saved[:2], saved[2:])
        came = None if rows.dispatch is None else rows.there(gradient[rows.owners])
        count, parts = rows.parts()
        first, second = fc1.blocks(count), fc2.blocks(count)
        size = len(kept) // len(parts)
        of_parts = [kept[start : start + size] for start in range(0, len(kept), size)]
        slopes = list[torch.Tensor]()

        def inputs() -> Iterator[torch.Tensor]:
            for part, (gate_up, *lows) in zip(parts, of_parts, strict=True):
                one, two = first[part.number], second[part.number]
                of_fc1, of_fc2 = lows[: len(fc1.factors)], lows[len(fc1.factors) :]
                d_down = gradient[rows.owners[part.rows]] if came is None else came[part.rows]
                factor = sent[1][part.rows] if sent else _column(factors, rows.slots[part.rows])
                d_weighted, d_of_fc2 = two.backward(d_down, part.groups)
                d_gate_up, d_factor, weighted = kernels.weighted_swiglu_backward(d_weighted, gate_up, factor)
                two.add_gradients(d_down, weighted, of_fc2, d_of_fc2, part.groups)
                del d_down, d_weighted, weighted
                d_taken, d_of_fc1 = one.backward(d_gate_up, part.groups)
                taken = sent[0][part.rows] if sent else x[rows.owners[part.rows]]
                one.add_gradients(d_gate_up, taken, of_fc1, d_of_fc1, part.groups)
                slopes.append(d_factor.to(factors.dtype))
                yield d_taken

        dx = rows.sums(inputs(), len(x))
        for block in (*first, *second):
            block.add_nothing()
        d_factors = torch.zeros_like(factors)
        d_factors.view(-1)[rows.slots] = rows.back(_joined(slopes))[:, 0]
        return (dx, d_factors, *[None] * (len(ctx.needs_input_grad) - 2))


def _joined(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all blocks. A single block is not copied."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _column(factors: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The factors [t, k] of some choices, [n, 1]."""
    return factors.flatten()[slots, None]
