"""Data parallelism: gradients summed over ranks that hold the same weights; optimizer state by rows on request.

Source of the sharding: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054),
stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspore import Tensor

from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.weight import Weight
from tandem.parallel.layout import even_rows


@dataclass(frozen=True)
class DataParallel:
    """The ranks that hold the same slices.

    With `by_rows`, each rank updates its rows of every weight (`even_rows`) and sends them to the others. Otherwise all
    ranks update everything.
    """

    ranks: Ranks
    by_rows: bool
    kernels: Kernels

    def own_rows(self, rows: int) -> tuple[int, int]:
        """The half-open range of rows that this rank updates."""
        return even_rows(rows, self.ranks.size, self.ranks.rank) if self.by_rows else (0, rows)

    def own_rows_of(self, tensor: Tensor) -> Tensor:
        """The rows that this rank updates, of a weight or of another tensor of its shape."""
        return self.kernels.rows(tensor, *self.own_rows(tensor.shape[0])) if self.by_rows else tensor

    @property
    def scatters(self) -> bool:
        """Whether each rank has only its own rows of gradients, once they are summed."""
        return self.by_rows and self.kernels.scatters_gradients

    def reduce(self, weights: Sequence[Weight]) -> None:
        """Sum the gradients of weights, which all have one, over the ranks."""
        if self.scatters:
            for weight in weights:
                weight.gradient = self.kernels.scatter_rows(self.ranks, _gradient(weight))
        elif self.ranks.group is not None:
            self.kernels.sum_over(self.ranks, [_gradient(weight) for weight in weights])

    def own_gradient(self, weight: Weight) -> Tensor:
        """After `reduce`: the rows that this rank updates with."""
        return _gradient(weight) if self.scatters else self.own_rows_of(_gradient(weight))

    def whole_gradient(self, weight: Weight) -> Tensor:
        """After `reduce`: all rows, on every rank."""
        if not self.scatters:
            return _gradient(weight)
        return self.ranks.gather_rows(_gradient(weight), weight.value.shape[0])

    def share(self, weights: Sequence[Weight]) -> None:
        """Update the weights' values from the masters, on whichever ranks these are."""
        if self.by_rows:
            self.kernels.gather_rows(self.ranks, weights)
        else:
            for weight in weights:
                weight.refresh()


def _gradient(weight: Weight) -> Tensor:
    assert weight.gradient is not None
    return weight.gradient
