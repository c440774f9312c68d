"""What NVIDIA's devices compute layers of experts with: as many kernels for 128 experts as for one.

How many rows an expert has is known on the device alone. Shapes are documented in `cpu_experts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch.nn.functional import pad

from tandem.backends.torch.compute import cpu_experts, pure
from tandem.backends.torch.compute.fused import Fused

ALIGNMENT = 16  # bytes: where rows of a matrix begin that a grouped product takes

WEIGHTED_SWIGLU = Fused(pure.weighted_swiglu, kernels=1)
WEIGHTED_SWIGLU_BACKWARD = Fused(pure.weighted_swiglu_backward, kernels=2)
ROUTE = Fused(pure.route, kernels=8)
ROUTE_BACKWARD = Fused(pure.route_backward, kernels=3)
SUM_ROWS = Fused(pure.sum_rows, kernels=1)
SET_PRODUCTS = Fused(pure.set_products, kernels=1)
ADD_PRODUCTS = Fused(pure.add_products, kernels=1)

FUSED = (WEIGHTED_SWIGLU, WEIGHTED_SWIGLU_BACKWARD, ROUTE, ROUTE_BACKWARD, SUM_ROWS, SET_PRODUCTS, ADD_PRODUCTS)


def groups(counts: torch.Tensor) -> torch.Tensor:
    """Where each expert's rows end, int32 [E], on the device."""
    return counts.cumsum(0, dtype=torch.int32)


def parts(groups: torch.Tensor) -> list[torch.Tensor]:
    """All experts at once."""
    return [groups]


def grouped_product(
    x: torch.Tensor, weight: torch.Tensor, groups: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    grouped_mm = _grouped_mm(x.device, x.dtype)
    if grouped_mm is None or not (_is_aligned(x) and _is_aligned(weight)):
        return cpu_experts.grouped_product(x, weight, cpu_experts.counts_of(groups), transposed=transposed)
    stack = weight.view(len(groups), -1, weight.shape[1])
    return grouped_mm(x, stack if transposed else stack.transpose(1, 2), offs=groups)


def add_grouped_product(
    target: torch.Tensor, first: bool, gradient: torch.Tensor, x: torch.Tensor, groups: torch.Tensor
) -> None:
    """The products are rounded to the dtype of x before they are added in fp32: the operator gives no other.

    On B200 it gives an expert without rows any numbers (pytorch issue 172439). They count as 0, on all devices.
    """
    grouped_mm = _grouped_mm(x.device, x.dtype)
    if grouped_mm is None or not (_is_aligned(gradient) and _is_aligned(x)):
        cpu_experts.add_grouped_product(target, first, gradient, x, cpu_experts.counts_of(groups))
        return
    products = grouped_mm(gradient.t(), x, offs=groups)
    (SET_PRODUCTS if first else ADD_PRODUCTS)(target.view_as(products), products, groups)


@cache
def _grouped_mm(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """PyTorch's grouped product; None where it has none for such matrices. It is tried once.

    It is public from 2.10 on, for Hopper alone in 2.8, and absent before.
    """
    operator = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if operator is None:
        return None
    x = torch.zeros(ALIGNMENT, ALIGNMENT, dtype=dtype, device=device)
    groups = torch.full((1,), ALIGNMENT, dtype=torch.int32, device=device)
    try:
        operator(x, x[None], offs=groups)
    except (RuntimeError, TypeError, ValueError):
        return None
    return operator


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether grouped products take it. They take no matrix without rows, either."""
    size = matrix.element_size()
    places = (matrix.stride(0) * size, matrix.storage_offset() * size)
    return matrix.stride(1) == 1 and len(matrix) > 0 and not any(place % ALIGNMENT for place in places)


def sum_rows(
    blocks: Iterable[torch.Tensor], owners: torch.Tensor, places: torch.Tensor, first: int, tokens: int
) -> torch.Tensor:
    """Without atomic additions: the order is the same each time, and sums are fp32."""
    (x,) = blocks
    sums = SUM_ROWS(x, places)
    return sums if len(sums) == tokens else pad(sums, (0, 0, first, tokens - first - len(sums)))
