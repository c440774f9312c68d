"""Adapters of experts and of routers: of weights that are not a linear layer's.

Experts: each has its own B A, so the products are grouped ones: two more for each adapter. A router has few rows. Its
adapter is added to it, W + scale B A, and the sum computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tandem.backends.torch.adapters import Factors
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.functional import Weight


@dataclass(frozen=True)
class Stack:
    """A weight of experts, one below the other, with its adapters.

    Rows of experts are consecutive: `groups`, of the device's kernels, tells which belong to each.
    """

    weight: Weight
    factors: Sequence[Factors] = field(default_factory=tuple)

    @property
    def weights(self) -> list[Weight]:
        return [self.weight, *(weight for f in self.factors for weight in (f.a, f.b))]

    def blocks(self, count: int) -> list[Stack]:
        """This stack cut into `count` equal ones. See `Gradient.blocks` for those that are trained."""
        if count == 1:
            return [self]
        of_weights = [_blocks(self.weight, count)]
        of_factors = [
            [replace(f, a=a, b=b) for a, b in zip(_blocks(f.a, count), _blocks(f.b, count))] for f in self.factors
        ]
        return [Stack(weight, factors) for weight, *factors in zip(*of_weights, *of_factors)]

    def add_nothing(self) -> None:
        """Let the gradients of what is trained be zeros, where nothing else is added."""
        for weight in self.weights:
            if weight.main_grad is not None:
                weight.main_grad.add_nothing()

    def product(self, x: torch.Tensor, groups: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Each expert's rows of x [n, i] times its weight: [n, o]. And scale times those with each adapter's A."""
        grouped_product = kernels_of(x.device).grouped_product
        product, lows = grouped_product(x, self.weight, groups), []
        for f in self.factors:
            low = grouped_product(x, f.a, groups).mul_(f.adapter.scale)
            change = grouped_product(low, f.b, groups).split(f.adapter.sizes, 1)
            for (start, stop), columns in zip(f.adapter.ranges, change):
                product[:, start:stop].add_(columns)
            lows.append(low)
        return product, lows

    def backward(self, gradient: torch.Tensor, groups: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradients of x, and of its products with each adapter's A, from that of `product`."""
        grouped_product = kernels_of(gradient.device).grouped_product
        dx, d_lows = grouped_product(gradient, self.weight, groups, transposed=True), []
        for f in self.factors:
            d_low = grouped_product(_columns(gradient, f), f.b, groups, transposed=True).mul_(f.adapter.scale)
            dx.add_(grouped_product(d_low, f.a, groups, transposed=True))
            d_lows.append(d_low)
        return dx, d_lows

    def add_gradients(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        lows: Sequence[torch.Tensor],
        d_lows: Sequence[torch.Tensor],
        groups: Any,
    ) -> None:
        """Add those of what is trained, from what `product` and `backward` gave."""
        if self.weight.main_grad is not None:
            self.weight.main_grad.add_grouped_product(gradient, x, groups)
        for f, low, d_low in zip(self.factors, lows, d_lows, strict=True):
            if f.b.main_grad is not None:
                f.b.main_grad.add_grouped_product(_columns(gradient, f), low, groups)
            if f.a.main_grad is not None:
                f.a.main_grad.add_grouped_product(d_low, x, groups)


def _blocks(weight: Weight, count: int) -> list[Weight]:
    """Equal blocks of rows, in the memory of the whole."""
    parts = [Weight(part, requires_grad=False) for part in weight.detach().chunk(count)]
    if weight.main_grad is not None:
        for part, gradient in zip(parts, weight.main_grad.blocks(count)):
            part.main_grad = gradient
    return parts


def _columns(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """The columns of x that an adapter adds to."""
    ranges = factors.adapter.ranges
    if ranges == ((0, x.shape[1]),):
        return x
    return torch.cat([x[:, start:stop] for start, stop in ranges], 1)


@dataclass(frozen=True)
class RouterWeight:
    """A router's weight [E, h] with its adapters, as one matrix."""

    weight: Weight
    factors: Sequence[Factors] = field(default_factory=tuple)

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.factors:
            return self.weight.to(dtype)
        changes = [(f.b.float() @ f.a.float()).mul_(f.adapter.scale) for f in self.factors]
        return sum(changes, self.weight.float()).to(dtype)

    def add_gradient(self, gradient: torch.Tensor, x: torch.Tensor) -> None:
        """Add what follows from that of the product, [t, E], with x [t, h]."""
        if self.weight.main_grad is not None:
            self.weight.main_grad.add_product(gradient, x)
        for f in self.factors:
            d_value = (gradient.float().t() @ x.float()).mul_(f.adapter.scale)
            if f.b.main_grad is not None:
                f.b.main_grad.add(d_value @ f.a.float().t())
            if f.a.main_grad is not None:
                f.a.main_grad.add(f.b.float().t() @ d_value)
