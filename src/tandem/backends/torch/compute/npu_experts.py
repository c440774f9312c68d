"""What Ascend's devices compute layers of experts with: as many operators for 128 experts as for one.

How many rows an expert has is known on the device alone: `npu_grouped_matmul` takes it as a tensor, from CANN 8.0.RC3
on. It gives zeros as the gradient of an expert without rows. Shapes are documented in `cpu_experts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch.nn.functional import pad

from tandem.backends.torch.compute import cpu_experts
from tandem.backends.torch.compute.npu import operators

ROWS, SUMMED = 0, 2  # group_type: what the groups divide, of a product [m, k] [k, n]: m or k
ONE_TENSOR = 3  # split_item: the result is one tensor


def groups(counts: torch.Tensor) -> torch.Tensor:
    """Where each expert's rows end, int64 [E], on the device."""
    return counts.cumsum(0)


def parts(groups: torch.Tensor) -> list[torch.Tensor]:
    """All experts at once."""
    return [groups]


def grouped_product(
    x: torch.Tensor, weight: torch.Tensor, groups: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    stack = weight.view(len(groups), -1, weight.shape[1])
    if not transposed:
        stack = stack.transpose(1, 2)
    return _grouped(x, stack, groups, ROWS) if len(x) else x.new_empty(0, stack.shape[2])


def add_grouped_product(
    target: torch.Tensor, first: bool, gradient: torch.Tensor, x: torch.Tensor, groups: torch.Tensor
) -> None:
    """The products are rounded to the dtype of x before they are added in fp32: the operator gives no other."""
    if len(x) and not _sums_groups(x.device, x.dtype):
        cpu_experts.add_grouped_product(target, first, gradient, x, cpu_experts.counts_of(groups))
    elif len(x):
        products = _grouped(gradient.t(), x, groups, SUMMED).view_as(target)
        target.copy_(products) if first else target.add_(products)
    elif first:
        target.zero_()


@cache
def _sums_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operator takes groups along what is summed. Those of torch_npu 2.6 do not, up to its release 7.1.

    It is tried once.
    """
    x, ends = torch.ones(16, 16, dtype=dtype, device=device), torch.full((1,), 16, dtype=torch.int64, device=device)
    try:
        _grouped(x.t(), x, ends, SUMMED).sum().item()  # an error of the device may come later
    except RuntimeError:
        return False
    return True


def _grouped(x: torch.Tensor, weight: torch.Tensor, groups: torch.Tensor, group_type: int) -> torch.Tensor:
    (result,) = operators().npu_grouped_matmul(
        [x], [weight], group_list=groups, split_item=ONE_TENSOR, group_type=group_type, group_list_type=0
    )
    return result


def sum_rows(
    blocks: Iterable[torch.Tensor], owners: torch.Tensor, places: torch.Tensor, first: int, tokens: int
) -> torch.Tensor:
    """Without atomic additions: the order is the same each time, and sums are fp32."""
    (x,) = blocks
    sums = x[places.flatten()].unflatten(0, places.shape).sum(1, dtype=torch.float32).to(x.dtype)
    return sums if len(sums) == tokens else pad(sums, (0, 0, first, tokens - first - len(sums)))
