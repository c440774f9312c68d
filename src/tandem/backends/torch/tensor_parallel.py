"""Megatron's tensor parallelism: ranks that share each tensor, with or without the tokens split between them.

Source: "Megatron-LM" (arXiv 1909.08053), section 3; sequence parallelism: "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function

from tandem.backends.torch.communication import Group, all_gather, reduce_scatter


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each tensor.

    Attributes:
        sequence: between the blocks each rank holds the residuals and norms of t / size consecutive tokens only.
        vocabulary_rows: rows of embedding and head on the first rank; other ranks have at most as many.
    """

    group: Group
    rank: int
    size: int
    sequence: bool
    vocabulary_rows: int

    @property
    def first_row(self) -> int:
        """The number of this rank's first row of the vocabulary."""
        return self.rank * self.vocabulary_rows

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Before a column-split product: all tokens' x, [t, h]; backward sums the ranks' gradients."""
        return _Enter.apply(x, self)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """After a row-split product: the sum of the ranks' x [t, h], of this rank's tokens if they are split."""
        return _Leave.apply(x, self)

    def outside(self, ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids as numbers of this rank's `rows` rows, and a mask of those on other ranks, whose number becomes 0."""
        local = ids - self.first_row
        absent = (local < 0) | (local >= rows)
        return local.masked_fill(absent, 0), absent

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x summed over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' largest x, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def sum_all(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum several small fp32 tensors in place, in one message."""
        tensors = list(tensors)
        if not tensors:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))

    def gather_tokens(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        all_gather(gathered, x.contiguous(), self.group).wait()
        return gathered

    def scatter_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of the sum over ranks."""
        scattered = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        reduce_scatter(scattered, x.contiguous(), self.group).wait()
        return scattered


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorParallel) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.gather_tokens(x) if ranks.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks = ctx.ranks
        return (ranks.scatter_tokens(gradient) if ranks.sequence else ranks.sum(gradient.contiguous())), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorParallel) -> torch.Tensor:
        ctx.ranks = ranks
        if ranks.sequence:
            return ranks.scatter_tokens(x)
        ctx.mark_dirty(x)
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks = ctx.ranks
        return (ranks.gather_tokens(gradient) if ranks.sequence else gradient), None
