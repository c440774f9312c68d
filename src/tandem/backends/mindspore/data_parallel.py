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

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Sum over the ranks, in place. MindSpore has no ReduceScatter on CPU, so every rank gets all rows."""
        if self.ranks.group is not None:
            self.kernels.sum_over(self.ranks, gradients)

    def share(self, weights: Sequence[Weight]) -> None:
        """Update the weights' values from the masters, on whichever ranks these are."""
        if self.by_rows:
            self.kernels.gather_rows(self.ranks, weights)
        else:
            for weight in weights:
                weight.refresh()
