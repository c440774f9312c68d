"""A layer's experts: a router chooses some for each token, and their outputs are summed with its factors.

Tokens are sorted by expert, so that each expert multiplies consecutive rows. No token is dropped, unless experts have a
capacity.

Shapes: t tokens, h hidden size, E experts, k of them for a token, n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mindspore import Tensor

from tandem.backends.experts import Dispatch, Routing, Share, Sorted
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.expert_adapters import RouterWeight, Stack
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.weight import Weight
from tandem.models.experts import Experts


@dataclass(frozen=True)
class Rows:
    """Tokens sorted by expert: expert after expert, and each expert's tokens in their order.

    Attributes:
        sent: those of this rank's tokens.
        groups: how the rows that come to this rank belong to its experts, in the device's form.
        dispatch: how rows travel; None where this rank has all experts.
    """

    sent: Sorted
    groups: Any
    dispatch: Dispatch | None = None

    @classmethod
    def of(cls, chosen: Any, experts: int, tokens: int, share: Share, ranks: Ranks, kernels: Kernels) -> Rows:
        """Of the experts of each token, [t, k]: those of this rank's share of the first `tokens` tokens."""
        sent = kernels.sort_choices(chosen, experts, *share.rows(tokens))
        if ranks.group is None:
            return cls(sent, kernels.groups(sent.counts))
        dispatch = kernels.dispatch(ranks, sent.counts)
        return cls(sent, kernels.groups(dispatch.counts), dispatch)


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps for its backward pass, besides its input.

    `taken`: what other ranks sent; None for what this rank takes itself, again. `choices`: those that experts with a
    capacity take, [t, k]; None for all.
    """

    rows: Rows
    factors: Tensor
    taken: tuple[Tensor, Tensor] | None
    choices: Any
    pull_route: Callable[[Tensor, Tensor], Tensor]
    pull_experts: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Mixture:
    """Takes the place of an MLP.

    Attributes:
        layer: its number in the whole model.
        experts: with this rank's width of an expert.
        router: [E, h].
        fc1, fc2: of this rank's experts, one below the other.
        ranks: those that share the experts.
        share: of the tokens, this rank's.
    """

    layer: int
    experts: Experts
    router: Weight | RouterWeight
    fc1: Stack
    fc2: Stack
    kernels: Kernels
    ranks: Ranks = field(default_factory=Ranks)
    share: Share = field(default_factory=Share)

    def forward(self, x: Tensor, routing: Routing) -> tuple[Tensor, Kept]:
        """x [t, h] -> [t, h], and what `backward` needs besides x."""
        factors, chosen, pull_route = self.kernels.route(x, self.router, self.experts, routing, self.layer)
        choices = None
        if routing.capacity is not None:
            choices, routing.taken[self.layer] = self.kernels.taken_choices(
                routing.capacity, chosen, factors, routing.tokens
            )
            factors = self.kernels.limited(factors, choices)
        rows = Rows.of(chosen, self.experts.num_experts, routing.tokens, self.share, self.ranks, self.kernels)
        taken = self._take(x, factors, rows)
        down, pull_experts = self.kernels.expert_mlp(*taken, self.fc1, self.fc2, rows.groups)
        output = self.kernels.sum_rows(self._back(down, rows), rows.sent, x.shape[0])
        return output, Kept(rows, factors, taken if rows.dispatch else None, choices, pull_route, pull_experts)

    def backward(self, gradient: Tensor, x: Tensor, kept: Kept) -> Tensor:
        """The gradient of x from that of the result. Adds the gradients of the weights."""
        rows, factors = kept.rows, kept.factors
        d_down = self._there(self.kernels.select_rows(gradient, rows.sent.tokens)[0], rows)
        d_taken, d_taken_factors = kept.pull_experts(d_down, *(kept.taken or self._take(x, factors, rows)))
        d_slots = self._back(d_taken_factors, rows)
        d_factors = self.kernels.place_rows(d_slots, rows.sent.slots, factors.shape[0] * factors.shape[1])
        d_rows = self.kernels.sum_rows(self._back(d_taken, rows), rows.sent, x.shape[0])
        d_factors = d_factors.reshape(factors.shape)
        if kept.choices is not None:
            d_factors = self.kernels.limited(d_factors, kept.choices)
        return kept.pull_route(d_factors, x) + d_rows

    def _take(self, x: Tensor, factors: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The rows that come to this rank's experts: tokens [n, h] and their factors [n, 1]."""
        return (
            self._there(self.kernels.select_rows(x, rows.sent.tokens)[0], rows),
            self._there(self.kernels.select_rows(factors.reshape(-1, 1), rows.sent.slots)[0], rows),
        )

    def _there(self, x: Tensor, rows: Rows) -> Tensor:
        """Rows of this rank's tokens -> the rows that come to its experts, sorted by these."""
        if rows.dispatch is None:
            return x
        came = self.kernels.exchange(self.ranks, x, rows.dispatch.between)
        return self.kernels.select_rows(came, rows.dispatch.order)[0]

    def _back(self, x: Tensor, rows: Rows) -> Tensor:
        """The reverse of `_there`."""
        if rows.dispatch is None:
            return x
        as_they_came = self.kernels.place_rows(x, rows.dispatch.order, x.shape[0])
        return self.kernels.exchange(self.ranks, as_they_came, rows.dispatch.between.T)
