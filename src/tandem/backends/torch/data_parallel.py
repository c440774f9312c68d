"""Data parallelism: gradients summed over ranks that hold the same weights; optimizer state by rows on request.

Source of the sharding: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054),
stage 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tandem.backends.torch.communication import Ranks
from tandem.backends.torch.functional import GradientBuffer, Weight
from tandem.parallel.layout import even_rows


@dataclass(frozen=True)
class DataParallel:
    """The ranks that hold the same slices. `by_rows`: each updates its rows of every weight (`even_rows`) and gives
    them to the others; otherwise all update everything."""

    ranks: Ranks
    by_rows: bool

    def own(self, rows: int) -> tuple[int, int]:
        """The rows that this rank updates."""
        return even_rows(rows, self.ranks.size, self.ranks.rank) if self.by_rows else (0, rows)

    def room(self, rows: int) -> int:
        """Rows to allocate, so that every rank's are equally many."""
        return -(-rows // self.ranks.size) * self.ranks.size if self.by_rows else rows

    def make_room(self, weight: Weight) -> None:
        """Give a weight of undefined values the rows of padding that `share` needs."""
        if self.by_rows:
            storage = torch.zeros(self.room(len(weight)), *weight.shape[1:], dtype=weight.dtype, device=weight.device)
            weight.data = storage[: len(weight)]

    def reduce(self, buffers: Iterable[GradientBuffer], *, everywhere: bool = False) -> None:
        """Sum over the ranks: each rank's own rows, or `everywhere` all of them."""
        group = self.ranks.group
        if group is None:
            return
        for buffer in buffers:
            storage = buffer.whole
            if self.by_rows and not everywhere:
                dist.reduce_scatter_tensor(self._chunk(storage), storage, group=group)
            else:
                dist.all_reduce(storage, group=group)

    def share(self, weights: Iterable[Weight]) -> None:
        """Give the other ranks the rows that this one has updated."""
        if self.ranks.group is None or not self.by_rows:
            return
        for weight in weights:
            whole = weight.data.as_strided((self.room(len(weight)), *weight.shape[1:]), weight.stride())
            dist.all_gather_into_tensor(whole, self._chunk(whole), group=self.ranks.group)

    def _chunk(self, storage: torch.Tensor) -> torch.Tensor:
        step = len(storage) // self.ranks.size
        return storage[self.ranks.rank * step : (self.ranks.rank + 1) * step]
