"""A linear layer with its adapters: y = x W^T + scale (x A^T) B^T, where each adapter adds to some of the columns of y.

All adapters of a layer are computed at once, with their A's stacked and their B's side by side.

Sources: "LoRA" (arXiv 2106.09685); rows with trained lengths: "DoRA" (arXiv 2402.09353), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mindspore as ms
from mindspore import Tensor, mint

from tandem.backends.adapters import Dropout, LocalAdapter, Switch
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.weight import Weight


@dataclass(frozen=True)
class Factors:
    """The weights of one adapter. `magnitude` is DoRA's."""

    adapter: LocalAdapter
    a: Weight
    b: Weight
    magnitude: Weight | None


@dataclass(frozen=True)
class Stretched:
    """What DoRA keeps of a forward pass: the product before its columns got their lengths, and the rows' lengths.

    `factors` is what the columns were multiplied with: magnitude / length; 1 for a row without an adapter.
    """

    product: Tensor
    lengths: Tensor
    factors: Tensor


@dataclass(frozen=True)
class Linear:
    """A weight [n, k] with its bias [n] and its adapters.

    Attributes:
        name: the weight's global name.
        columns: the ranks that hold the other columns of the weight; None where this rank holds all.
        switch: turns the adapters on and off.
    """

    name: str
    weight: Weight
    bias: Weight | None
    factors: Sequence[Factors]
    columns: Ranks | None
    kernels: Kernels
    switch: Switch

    def forward(self, x: Tensor, dropout: Dropout | None) -> tuple[Tensor, Stretched | None]:
        """x [t, k] -> [t, n], and what `backward` needs besides x."""
        product = self.kernels.product(x, self.weight.value, transpose_b=True)
        kept = None
        if self.factors and self.switch.on:
            a, b = self._stacked()
            low = self.kernels.product(self._dropped(x, dropout), a, transpose_b=True)
            product = product + self.kernels.product(low, b, transpose_b=True)
            if self.factors[0].magnitude is not None:
                kept = self._stretched(product, a, b)
                product = self.kernels.scale_columns(product, kept.factors)
        return (product if self.bias is None else product + self.bias.value), kept

    def backward(self, gradient: Tensor, x: Tensor, kept: Stretched | None, dropout: Dropout | None) -> Tensor:
        """The gradient of x from that of the result. Adds the gradients of all trained weights."""
        kernels = self.kernels
        if self.bias is not None and self.bias.trained:
            self.bias.add_gradient(gradient.astype(ms.float32).sum(axis=0))
        if kept is not None:
            self._add_magnitudes(kernels.dot_columns(gradient, kept.product), kept.lengths)
            gradient = kernels.scale_columns(gradient, kept.factors)
        if self.weight.trained:
            self.weight.add_gradient(kernels.weight_gradient(gradient, x))
        dx = kernels.product(gradient, self.weight.value)
        if not self.factors:
            return dx
        a, b = self._stacked()
        dropped = self._dropped(x, dropout)
        low = kernels.product(dropped, a, transpose_b=True)
        dlow = kernels.product(gradient, b)
        self._add_factors(kernels.weight_gradient(dlow, dropped), kernels.weight_gradient(gradient, low))
        return dx + self._dropped(kernels.product(dlow, a), dropout)

    @cached_property
    def _columns(self) -> list[tuple[int, int]]:
        """Where each adapter's rank lies in the stack."""
        ends = [sum(f.adapter.rank for f in self.factors[: number + 1]) for number in range(len(self.factors))]
        return [(end - f.adapter.rank, end) for f, end in zip(self.factors, ends)]

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """All A's, [R, k], and all B's times their scales, [n, R], with zeros where an adapter adds nothing."""
        first, *others = (f.a.value for f in self.factors)
        a = mint.cat((first, *others), 0) if others else first
        parts = [(f.b.value, f.adapter.scale, f.adapter.ranges) for f in self.factors]
        return a, self.kernels.side_by_side(parts, self.weight.value.shape[0])

    def _add_factors(self, da: Tensor, db: Tensor) -> None:
        """Add the gradients of the stacked A's and of the B's side by side to those of the factors."""
        for f, (first, last) in zip(self.factors, self._columns):
            f.a.add_gradient(self.kernels.rows(da, first, last))
            f.b.add_gradient(self.kernels.block(db, f.adapter.ranges, (first, last), f.adapter.scale))

    def _dropped(self, x: Tensor, dropout: Dropout | None) -> Tensor:
        """x [t, k] with numbers dropped. It is also the backward pass of itself."""
        if dropout is None:
            return x
        rank, ranks = (0, 1) if self.columns is None else (self.columns.rank, self.columns.size)
        tokens, features = x.shape
        return x * Tensor(dropout.factors(self.name, tokens, features, rank, ranks)).astype(x.dtype)

    def _stretched(self, product: Tensor, a: Tensor, b: Tensor) -> Stretched:
        """No gradient follows the lengths, as in the paper."""
        squares = self.kernels.row_squares(self.weight.value, self.kernels.product(b, a))
        if self.columns is not None and self.columns.group is not None:
            squares = self.columns.sum(squares)
        lengths = mint.sqrt(squares)
        parts = [(f.magnitude.value, f.adapter.ranges) for f in self.factors if f.magnitude is not None]
        return Stretched(product, lengths, self.kernels.stretch(parts, lengths))

    def _add_magnitudes(self, dots: Tensor, lengths: Tensor) -> None:
        gradient = (dots / lengths).reshape(-1, 1)
        for f in self.factors:
            assert f.magnitude is not None
            rows = self.kernels.block(gradient, f.adapter.ranges, (0, 1), 1.0)
            f.magnitude.add_gradient(rows.reshape(-1))
