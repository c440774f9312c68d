"""A layer's experts: a router chooses some for each token, and their outputs are summed with its factors.

Tokens are sorted by expert, so that each expert multiplies consecutive rows. No token is dropped.

Shapes: t tokens, h hidden size, E experts, k of them for a token, n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from tandem.backends.experts import Routing
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.weight import Weight
from tandem.models.experts import Experts


@dataclass(frozen=True)
class Rows:
    """Tokens sorted by expert: expert after expert, and each expert's tokens in their order.

    Attributes:
        slots: of each row, which of the t k choices it is: token times k, plus the place among the token's experts.
        tokens: of each row, the number of its token.
        counts: rows of each expert.
    """

    slots: np.ndarray
    tokens: np.ndarray
    counts: list[int]

    @classmethod
    def of(cls, chosen: np.ndarray, experts: int) -> Rows:
        """`chosen`: the experts of each token, [t, k]."""
        flat = chosen.reshape(-1)
        slots = np.argsort(flat, kind="stable")
        return cls(slots, slots // chosen.shape[1], np.bincount(flat, minlength=experts).tolist())


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps for its backward pass, besides its input."""

    rows: Rows
    factors: Tensor
    pull_route: Callable[[Tensor, Tensor], Tensor]
    pull_experts: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Mixture:
    """Takes the place of an MLP.

    Attributes:
        layer: its number in the whole model.
        experts: with this rank's width of an expert.
        router: [E, h].
        fc1, fc2: of all experts, one below the other.
    """

    layer: int
    experts: Experts
    router: Weight
    fc1: Weight
    fc2: Weight
    kernels: Kernels

    def forward(self, x: Tensor, routing: Routing) -> tuple[Tensor, Kept]:
        """x [t, h] -> [t, h], and what `backward` needs besides x."""
        factors, chosen, pull_route = self.kernels.route(x, self.router, self.experts, routing, self.layer)
        rows = Rows.of(chosen, self.experts.num_experts)
        taken, taken_factors = self._take(x, factors, rows)
        down, pull_experts = self.kernels.expert_mlp(taken, taken_factors, self.fc1, self.fc2, rows.counts)
        return self.kernels.sum_rows(down, rows.tokens, x.shape[0]), Kept(rows, factors, pull_route, pull_experts)

    def backward(self, gradient: Tensor, x: Tensor, kept: Kept) -> Tensor:
        """The gradient of x from that of the result. Adds the gradients of the weights."""
        rows, factors = kept.rows, kept.factors
        d_down = self.kernels.select_rows(gradient, rows.tokens)[0]
        d_taken, d_taken_factors = kept.pull_experts(d_down, *self._take(x, factors, rows))
        d_factors = self.kernels.place_rows(d_taken_factors, rows.slots, factors.shape[0] * factors.shape[1])
        d_x = kept.pull_route(d_factors.reshape(factors.shape), x)
        return d_x + self.kernels.sum_rows(d_taken, rows.tokens, x.shape[0])

    def _take(self, x: Tensor, factors: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The rows' tokens [n, h] and their factors [n, 1]."""
        return (
            self.kernels.select_rows(x, rows.tokens)[0],
            self.kernels.select_rows(factors.reshape(-1, 1), rows.slots)[0],
        )
