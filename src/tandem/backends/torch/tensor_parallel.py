"""Megatron's tensor parallelism: ranks that share each tensor, with or without the tokens split between them.

Source: "Megatron-LM" (arXiv 1909.08053), section 3; sequence parallelism: "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function

from tandem.backends.torch.communication import Group, all_gather, all_reduce, reduce_scatter
from tandem.backends.torch.functional import Weight, add_bias, applied, matmul


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

    def gather_tokens(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to gather all tokens' x. The function that is returned waits for it."""
        gathered, x = x.new_empty(x.shape[0] * self.size, *x.shape[1:]), x.contiguous()
        return partial(_awaited, all_gather(gathered, x, self.group), gathered, x)

    def scatter_tokens(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to sum x over the ranks, for this rank's tokens. The function that is returned waits for it."""
        scattered, x = x.new_empty(x.shape[0] // self.size, *x.shape[1:]), x.contiguous()
        return partial(_awaited, reduce_scatter(scattered, x, self.group), scattered, x)

    def sum_of_entered(self, gradient: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to sum the ranks' gradients of what was entered. The function that is returned waits for it."""
        if self.sequence:
            return self.scatter_tokens(gradient)
        gradient = gradient.contiguous()
        return partial(_awaited, all_reduce(gradient, self.group), gradient)


def _awaited(work: dist.Work, result: torch.Tensor, *sent: torch.Tensor) -> torch.Tensor:
    """Wait for a collective. `sent` stays in memory until then."""
    work.wait()
    return result


def entered_linear(x: torch.Tensor, weight: Weight, bias: Weight | None, ranks: TensorParallel) -> torch.Tensor:
    """`linear` of `ranks.enter(x)`, whose backward pass computes while tokens and gradients travel.

    Tokens are gathered again for the weight's gradient while that of x is computed. Then the latter is summed over the
    ranks while the weight's is computed.
    """
    return applied(_EnteredLinear, x, weight, bias, ranks)


class _EnteredLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight, bias: Weight | None, ranks: TensorParallel) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.ranks = weight, bias, ranks
        product = matmul(ranks.gather_tokens(x)() if ranks.sequence else x, weight)
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        main_grad, ranks = ctx.weight.main_grad, ctx.ranks
        gathered = ranks.gather_tokens(x) if ranks.sequence and main_grad is not None else lambda: x
        summed = ranks.sum_of_entered(matmul(gradient, ctx.weight.t()))
        if main_grad is not None:
            main_grad.add_product(gradient, gathered())
        add_bias(ctx.bias, gradient)
        return summed(), None, None, None


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorParallel) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.gather_tokens(x)() if ranks.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.sum_of_entered(gradient)(), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorParallel) -> torch.Tensor:
        ctx.ranks = ranks
        if ranks.sequence:
            return ranks.scatter_tokens(x)()
        ctx.mark_dirty(x)
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks = ctx.ranks
        return (ranks.gather_tokens(gradient)() if ranks.sequence else gradient), None
