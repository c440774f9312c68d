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
    """The ranks that hold the same slices. `by_rows`: each updates its rows of every weight (`even_rows`) and gives
    them to the others; otherwise all update everything."""

    ranks: Ranks
    by_rows: bool
    kernels: Kernels

    def own_rows(self, rows: int) -> tuple[int, int]:
        """The rows that this rank updates."""
        return even_rows(rows, self.ranks.size, self.ranks.rank) if self.by_rows else (0, rows)

    def own(self, tensor: Tensor) -> Tensor:
        """Those rows of a weight, or of anything of its shape."""
        return self.kernels.rows(tensor, *self.own_rows(tensor.shape[0])) if self.by_rows else tensor

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Sum over the ranks, in place. MindSpore has no ReduceScatter on CPU, so every rank gets all rows."""
        if self.ranks.group is not None:
            self.kernels.sum_over(self.ranks, gradients)

    def share(self, weights: Sequence[Weight]) -> None:
        """Bring the weights' values up to date with the masters, wherever those are."""
        if self.by_rows:
            self.kernels.gather_rows(self.ranks, weights)
        else:
            for weight in weights:
                weight.refresh()
