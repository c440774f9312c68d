"""Weights, gradients and optimizer state sharded by rows over data ranks: a layer is whole only while it computes.

Source: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054), stage 3, with the
semantics of PyTorch's `fully_shard`: gathered before a layer's forward pass and freed after it, gathered again for its
backward pass, gradients scattered in fp32 after every micro-batch. `fully_shard` itself needs gradients that autograd
accumulates; here weights add their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function

from tandem.backends.torch.communication import Ranks, all_gather, reduce_scatter
from tandem.backends.torch.data_parallel import chunk, own_rows, padded_rows
from tandem.backends.torch.functional import GradientBuffer, Weight


class Unit:
    """Weights that are gathered and freed together: a decoder layer's, or those outside layers.

    Args:
        before: the layer whose output is this one's input, if it is on the same chunk.

    Attributes:
        rows: this rank's rows of each weight, padded so that ranks have equally many.
        gradients: of `rows`, fp32, summed over ranks and micro-batches.
    """

    def __init__(self, weights: Iterable[Weight], ranks: Ranks, before: Unit | None = None) -> None:
        self.rows: dict[Weight, torch.Tensor] = {}
        self.gradients: dict[Weight, torch.Tensor] = {}
        self.before, self.after = before, None
        if before is not None:
            before.after = self
        self._ranks = ranks
        self._wholes: dict[Weight, torch.Tensor] = {}
        self._gathering: list[dist.Work] | None = None  # None: freed
        self._reducing: list[tuple[dist.Work, torch.Tensor, torch.Tensor]] = []
        for weight in weights:
            whole = weight.data.new_empty(padded_rows(ranks, len(weight)), *weight.shape[1:])
            weight.data = whole[: len(weight)]
            self.rows[weight] = torch.zeros_like(chunk(ranks, whole))
            self._wholes[weight] = whole
        self.free()

    def around(self, layer: Callable[..., torch.Tensor], x: torch.Tensor, *others: Any) -> torch.Tensor:
        """layer(x, *others), whose weights are whole during its forward and its backward pass."""
        return _Close.apply(layer(_Open.apply(x, self), *others), self)

    def start_gathering(self) -> None:
        if self._gathering is None:
            for whole in self._wholes.values():
                whole.untyped_storage().resize_(whole.nbytes)
            pairs = [(whole, self.rows[weight]) for weight, whole in self._wholes.items()]
            self._gathering = [all_gather(whole, rows, self._ranks.group) for whole, rows in pairs]

    def gather(self) -> None:
        """Return when the weights are whole."""
        self.start_gathering()
        assert self._gathering is not None
        while self._gathering:
            self._gathering.pop().wait()

    def free(self) -> None:
        for whole in self._wholes.values():
            whole.untyped_storage().resize_(0)
        self._gathering = None

    def make_gradients(self) -> None:
        """Let a backward pass add whole gradients."""
        self.finish_reducing()
        for weight, whole in self._wholes.items():
            weight.main_grad = GradientBuffer(weight, len(whole))

    def start_reducing(self) -> None:
        """Sum the whole gradients over the ranks; they are gone for other uses."""
        for weight, rows in self.gradients.items():
            assert weight.main_grad is not None
            whole, weight.main_grad = weight.main_grad.whole, None
            own = chunk(self._ranks, whole)
            self._reducing.append((reduce_scatter(own, whole, self._ranks.group), own, rows))

    def finish_reducing(self) -> None:
        """Return when `gradients` hold all that was asked for."""
        for work, own, rows in self._reducing:
            work.wait()
            rows.add_(own)
        self._reducing.clear()


class _Open(Function):
    """Before a layer: its weights become whole, and are given back when its backward pass is over."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, unit: Unit) -> torch.Tensor:
        ctx.unit = unit
        unit.gather()
        if unit.after is not None:
            unit.after.start_gathering()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        unit = ctx.unit
        if unit.after is not None:
            unit.after.finish_reducing()
        unit.start_reducing()
        unit.free()
        return gradient, None


class _Close(Function):
    """After a layer: its weights are given back, and become whole again for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, unit: Unit) -> torch.Tensor:
        ctx.unit = unit
        unit.free()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        unit = ctx.unit
        unit.gather()
        if unit.before is not None:
            unit.before.start_gathering()
        unit.make_gradients()
        return gradient, None


class FullySharded:
    """`tandem.backends.torch.data_parallel.Sharing` of ranks that keep their own rows of everything.

    Weights outside layers stay whole during all passes of a step, as those of `fully_shard`'s root do.
    """

    weights_by_rows = by_rows = True

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._layers: list[Unit] = []
        self._outside: list[Unit] = []
        self._units: dict[Weight, Unit] = {}
        self._last: Unit | None = None

    def add_layer(self, weights: Iterable[Weight]) -> Unit:
        """Shard the weights of the next layer of a chunk."""
        self._last = Unit(weights, self.ranks, before=self._last)
        self._layers.append(self._last)
        self._units |= dict.fromkeys(self._last.rows, self._last)
        return self._last

    def end_chunk(self, weights: Iterable[Weight]) -> None:
        """Shard those of a chunk's weights that are outside its layers."""
        unit = Unit([weight for weight in weights if weight not in self._units], self.ranks)
        self._outside.append(unit)
        self._units |= dict.fromkeys(unit.rows, unit)
        self._last = None

    def prepare(self, weights: Sequence[Weight], *, training: bool) -> None:
        if training:
            for unit in (*self._layers, *self._outside):
                unit.gradients = {w: torch.zeros_like(rows, dtype=torch.float32) for w, rows in unit.rows.items()}

    def begin(self, *, gradients: bool) -> None:
        for unit in self._outside:
            unit.gather()
            if gradients:
                unit.make_gradients()
        if gradients:
            for unit in (*self._layers, *self._outside):
                for gradient in unit.gradients.values():
                    gradient.zero_()

    def end(self) -> None:
        for unit in self._outside:
            unit.free()

    def reduce(self) -> None:
        for unit in self._outside:
            unit.start_reducing()
        for unit in (*self._layers, *self._outside):
            unit.finish_reducing()

    def share(self) -> None:
        pass

    def kept(self, weight: Weight) -> torch.Tensor:
        return self._own(weight, self._units[weight].rows[weight])

    def updated(self, weight: Weight) -> torch.Tensor:
        return self.kept(weight)

    def gradient(self, weight: Weight) -> torch.Tensor:
        return self._own(weight, self._units[weight].gradients[weight])

    def whole_gradient(self, weight: Weight) -> torch.Tensor:
        rows = self._units[weight].gradients[weight]
        whole = rows.new_empty(padded_rows(self.ranks, len(weight)), *weight.shape[1:])
        all_gather(whole, rows, self.ranks.group).wait()
        return whole[: len(weight)]

    def _own(self, weight: Weight, padded: torch.Tensor) -> torch.Tensor:
        start, stop = own_rows(self.ranks, len(weight), by_rows=True)
        return padded[: stop - start]
