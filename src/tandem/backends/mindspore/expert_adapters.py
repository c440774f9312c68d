"""Adapters of experts and of routers: of weights that are not a linear layer's.

Experts: each has its own B A, so the products are those of `Kernels.grouped`: two more for each adapter. A router has
few rows. Its adapter is added to it, W + scale B A, and the sum computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import Tensor

from tandem.backends.adapters import Switch
from tandem.backends.mindspore.adapters import Factors
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.weight import Weight


@dataclass(frozen=True)
class Stack:
    """A weight of experts, one below the other, with its adapters. `switch` turns these on and off.

    Rows of experts are consecutive: `groups`, of the device's kernels, tells which belong to each.
    """

    weight: Weight
    factors: Sequence[Factors]
    kernels: Kernels
    switch: Switch

    def product(self, x: Tensor, groups: Any) -> tuple[Tensor, list[Tensor]]:
        """Each expert's rows of x [n, i] times its weight: [n, o]. And what `backward` needs besides x."""
        product, kept = self.kernels.grouped(x, self.weight, groups), []
        for f in self.factors if self.switch.on else ():
            low = self.kernels.grouped(x, f.a, groups) * f.adapter.scale
            product = self.kernels.add_columns(product, self.kernels.grouped(low, f.b, groups), f.adapter.ranges)
            kept.append(low)
        return product, kept

    def backward(self, gradient: Tensor, x: Tensor, kept: Sequence[Tensor], groups: Any) -> Tensor:
        """The gradient of x from that of the product. Adds the gradients of what is trained."""
        dx = self.kernels.grouped_backward(gradient, x, self.weight, groups)
        for f, low in zip(self.factors, kept, strict=True):
            columns = self.kernels.columns(gradient, f.adapter.ranges)
            d_low = self.kernels.grouped_backward(columns, low, f.b, groups) * f.adapter.scale
            dx = dx + self.kernels.grouped_backward(d_low, x, f.a, groups)
        return dx


@dataclass(frozen=True)
class RouterWeight:
    """A router's weight [E, h] with its adapters, as one matrix: what kernels need of a `Weight`."""

    weight: Weight
    factors: Sequence[Factors]
    kernels: Kernels
    switch: Switch

    @property
    def value(self) -> Tensor:
        if not self.switch.on:
            return self.weight.value
        value = _single(self.weight)
        for f in self.factors:
            value = value + self.kernels.product(_single(f.b), _single(f.a)) * f.adapter.scale
        return value.astype(self.weight.value.dtype)

    @property
    def trained(self) -> bool:
        return self.weight.trained or any(weight.trained for f in self.factors for weight in (f.a, f.b))

    def add_gradient(self, value: Tensor) -> None:
        self.weight.add_gradient(value)
        for f in self.factors:
            scaled = value.astype(ms.float32) * f.adapter.scale
            f.b.add_gradient(self.kernels.product(scaled, _single(f.a), transpose_b=True))
            f.a.add_gradient(self.kernels.weight_gradient(_single(f.b), scaled))


def _single(weight: Weight) -> Tensor:
    return weight.value.astype(ms.float32)
