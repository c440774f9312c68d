"""Adapters on a linear layer: y = x W^T + scale (x A^T) B^T, where each adapter adds to some of the columns of y.

All adapters of a layer are computed at once, with their A's stacked and their B's side by side.

Sources: "LoRA" (arXiv 2106.09685); rows with trained lengths: "DoRA" (arXiv 2402.09353), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd import Function

from tandem.backends.adapters import Dropout, LocalAdapter, Ranges
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.functional import Weight, matmul
from tandem.backends.torch.tensor_parallel import TensorParallel


class Factor(nn.Module):
    """A weight of the kind of `like`, under its name in the layer's tables of factors."""

    def __init__(self, *shape: int, like: Weight) -> None:
        super().__init__()
        self.weight = type(like)(torch.empty(shape, dtype=like.dtype, device=like.device))


@dataclass(frozen=True)
class Factors:
    """The weights of one adapter. `magnitude` is DoRA's."""

    adapter: LocalAdapter
    a: Weight
    b: Weight
    magnitude: Weight | None


def attach(
    module: nn.Module, weight: Weight, adapters: Sequence[LocalAdapter], *, matrices: int = 1, dora: bool = False
) -> None:
    """Give a module the factors of its weight's adapters, under the names that the layout gives them.

    Args:
        matrices: how many the weight is made of, one below the other. Each has factors of its own.
    """

    def tables(shape: Callable[[LocalAdapter], tuple[int, ...]]) -> nn.ModuleDict:
        return nn.ModuleDict({a.module: Factor(*shape(a), like=weight) for a in adapters})

    module.lora_A = tables(lambda adapter: (matrices * adapter.rank, weight.shape[1]))
    module.lora_B = tables(lambda adapter: (matrices * sum(adapter.sizes), adapter.rank))
    if dora:
        module.lora_magnitude_vector = tables(lambda adapter: (sum(adapter.sizes),))


def factors_of(module: nn.Module, adapters: Sequence[LocalAdapter]) -> list[Factors]:
    """The factors that `attach` made."""

    def weight(table: str, adapter: LocalAdapter) -> Weight:
        return cast(Factor, cast(nn.ModuleDict, getattr(module, table))[adapter.module]).weight

    dora = hasattr(module, "lora_magnitude_vector")
    return [
        Factors(
            adapter,
            weight("lora_A", adapter),
            weight("lora_B", adapter),
            weight("lora_magnitude_vector", adapter) if dora else None,
        )
        for adapter in adapters
    ]


@dataclass(frozen=True)
class Adapted:
    """The weight of a linear layer, and what is added to it.

    Attributes:
        name: the weight's global name.
        columns: the ranks that hold the other columns of the weight; None where this rank holds all.
        dropout: of the adapters' input.
    """

    name: str
    weight: Weight
    bias: Weight | None
    factors: Sequence[Factors]
    columns: TensorParallel | None
    dropout: Dropout | None

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x [t, k] with numbers dropped. It is also the backward pass of itself."""
        if self.dropout is None:
            return x
        rank, ranks = (0, 1) if self.columns is None else (self.columns.rank, self.columns.size)
        factors = self.dropout.factors(self.name, len(x), x.shape[1], rank, ranks)
        return x * torch.from_numpy(factors).to(x.device, x.dtype)


def adapted_linear(x: torch.Tensor, adapted: Adapted) -> torch.Tensor:
    """x [t, k] -> [t, n] with weight [n, k], its adapters, and bias [n] where there is one."""
    trained = [w for f in adapted.factors for w in (f.a, f.b, f.magnitude) if w is not None]
    return _AdaptedLinear.apply(x, adapted, *trained)


class _AdaptedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, adapted: Adapted, *_: Weight) -> torch.Tensor:
        weight, bias, factors = adapted.weight, adapted.bias, adapted.factors
        a, b = _stacked(factors, len(weight))
        low = matmul(adapted.dropped(x), a)
        product = matmul(x, weight).addmm_(low, b.t())
        ctx.adapted = adapted
        if factors[0].magnitude is None:
            ctx.save_for_backward(x, low)
            return product if bias is None else product.add_(bias)
        lengths = _lengths(adapted, a, b)
        stretch = _stretch(factors, lengths)
        ctx.save_for_backward(x, low, product, lengths, stretch)
        stretched = (product * stretch).to(x.dtype)
        return stretched if bias is None else stretched.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, *of_dora = ctx.saved_tensors
        adapted: Adapted = ctx.adapted
        if of_dora:
            product, lengths, stretch = of_dora
            _add_magnitudes(adapted.factors, (gradient * product).sum(0, dtype=torch.float32) / lengths)
            gradient = (gradient * stretch).to(gradient.dtype)
        a, b = _stacked(adapted.factors, len(adapted.weight))
        dlow = matmul(gradient, b.t())
        da, db = matmul(dlow.t(), adapted.dropped(x).t()), matmul(low.t(), gradient.t()).t()  # no copy of gradient^T
        _add_factors(adapted.factors, da, db)
        dx = matmul(gradient, adapted.weight.t())
        if adapted.dropout is None:
            dx.addmm_(dlow, a)
        else:
            dx.add_(adapted.dropped(matmul(dlow, a.t())))
        return (dx, *[None] * (len(ctx.needs_input_grad) - 1))


def _stacked(factors: Sequence[Factors], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All A's, [R, k], and all B's times their scales, [rows, R], with zeros where an adapter adds nothing."""
    with torch.no_grad():
        if len(factors) == 1 and len(factors[0].b) == rows:
            return factors[0].a, factors[0].b * factors[0].adapter.scale
        a = torch.cat([f.a for f in factors])
        b = a.new_zeros(rows, len(a))
        for f, columns in zip(factors, _columns(factors)):
            for rows_of_b, view in _pairs(f.b, b[:, columns], f.adapter.ranges):
                torch.mul(rows_of_b, f.adapter.scale, out=view)
        return a, b


def _columns(factors: Sequence[Factors]) -> list[slice]:
    """Where each adapter's rank lies in the stack."""
    ends = [sum(f.adapter.rank for f in factors[: number + 1]) for number in range(len(factors))]
    return [slice(end - f.adapter.rank, end) for f, end in zip(factors, ends)]


def _add_factors(factors: Sequence[Factors], da: torch.Tensor, db: torch.Tensor) -> None:
    """Add the gradients of the stacked A's and of the B's side by side to those of the factors."""
    for f, columns in zip(factors, _columns(factors)):
        if f.a.main_grad is not None:
            f.a.main_grad.add(da[columns])
        if f.b.main_grad is not None:
            f.b.main_grad.add(_at(db[:, columns], f.adapter.ranges).float().mul_(f.adapter.scale))


def _lengths(adapted: Adapted, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The lengths of the rows of W + B A, fp32 [rows]. No gradient follows them, as in the paper."""
    weight = adapted.weight
    squares = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, kernels_of(weight.device).weight_piece // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        squares[rows] = torch.addmm(weight[rows].float(), b[rows].float(), a.float()).square_().sum(1)
    return (squares if adapted.columns is None else adapted.columns.sum(squares)).sqrt_()


def _stretch(factors: Sequence[Factors], lengths: torch.Tensor) -> torch.Tensor:
    """What each column of the product is multiplied with, fp32 [rows]: magnitude / length, and 1 without an adapter."""
    stretch = torch.ones_like(lengths)
    for f in factors:
        assert f.magnitude is not None
        for magnitude, view in _pairs(f.magnitude, stretch, f.adapter.ranges):
            view.copy_(magnitude.float() / _at(lengths, f.adapter.ranges).view(view.shape))
    return stretch


def _add_magnitudes(factors: Sequence[Factors], gradient: torch.Tensor) -> None:
    for f in factors:
        assert f.magnitude is not None
        if f.magnitude.main_grad is not None:
            f.magnitude.main_grad.add(_at(gradient, f.adapter.ranges))


def _views(x: torch.Tensor, ranges: Ranges) -> list[torch.Tensor]:
    """The rows of x [rows, ...] at ranges, as few views of x, each [some ranges, rows of one, ...].

    Ranges of one size at one distance, such as the queries of each group, are one view: a kernel takes them at once.
    """
    (first, stop), *others = ranges
    size, step = stop - first, others[0][0] - first if others else stop - first
    if all(place == (first + number * step, first + number * step + size) for number, place in enumerate(ranges)):
        shape, strides = (len(ranges), size, *x.shape[1:]), (step * x.stride(0), *x.stride())
        return [x.as_strided(shape, strides, x.storage_offset() + first * x.stride(0))]
    return [x[start:stop][None] for start, stop in ranges]


def _pairs(x: torch.Tensor, whole: torch.Tensor, ranges: Ranges) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of x and their places at ranges of `whole`, in the same shape."""
    views = _views(whole, ranges)
    parts = x.split([view.shape[0] * view.shape[1] for view in views])
    return ((part.view(view.shape), view) for part, view in zip(parts, views))


def _at(x: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """The rows of x at ranges, one below the other. It may share the memory of x."""
    views = [view.flatten(0, 1) for view in _views(x, ranges)]
    return views[0] if len(views) == 1 else torch.cat(views)
