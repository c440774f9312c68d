"""What each device computes with. The one place where devices differ, beside preparing them (`device`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore import attention, buckets, functional, loss, npu
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.device import prepare
from tandem.backends.mindspore.weight import Pullback, Weight

Differentiable = Callable[..., "tuple[Tensor, Pullback]"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions that each device has its own of; signatures and shapes are those of the CPU's.

    Attributes:
        product, weight_gradient: of matrices in one dtype; an NPU gives the gradient in that dtype, too.
        rows: the given rows of a tensor; on CPU they share its memory.
        place_rows: the transpose of `select_rows`, without a pullback.
        sum_over, gather_rows: collectives over many tensors.
        bf16: matrix products in bfloat16 exist.
        fp32_notice: what the user should know when computing in fp32.
    """

    product: Callable[..., Tensor]
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    embedding: Differentiable
    select_rows: Differentiable
    place_rows: Callable[[Tensor, np.ndarray, int], Tensor]
    rows: Callable[[Tensor, int, int], Tensor]
    rms_norm: Differentiable
    swiglu: Differentiable
    attention: Differentiable
    cross_entropy: Callable[..., float]
    cross_entropy_and_gradient: Callable[..., tuple[float, Tensor]]
    zeros: Callable[[tuple[int, ...]], Tensor]
    scale: Callable[[Tensor, float], None]
    sum_of_squares: Callable[[Tensor], float]
    sum_over: Callable[[Ranks, Sequence[Tensor]], None]
    gather_rows: Callable[[Ranks, Sequence[Weight]], None]
    bf16: bool
    fp32_notice: str = ""


CPU = Kernels(
    product=functional.product,
    weight_gradient=functional.weight_gradient,
    embedding=functional.embedding,
    select_rows=functional.select_rows,
    place_rows=functional.place_rows,
    rows=functional.rows,
    rms_norm=functional.rms_norm,
    swiglu=functional.swiglu,
    attention=attention.attention,
    cross_entropy=loss.cross_entropy,
    cross_entropy_and_gradient=loss.cross_entropy_and_gradient,
    zeros=functional.zeros,
    scale=functional.scale,
    sum_of_squares=functional.sum_of_squares,
    sum_over=buckets.sum_over,
    gather_rows=buckets.gather_rows,
    bf16=False,
)

NPU = Kernels(
    product=npu.product,
    weight_gradient=npu.weight_gradient,
    embedding=npu.embedding,
    select_rows=npu.select_rows,
    place_rows=npu.place_rows,
    rows=npu.rows,
    rms_norm=npu.rms_norm,
    swiglu=npu.swiglu,
    attention=npu.attention,
    cross_entropy=npu.cross_entropy,
    cross_entropy_and_gradient=npu.cross_entropy_and_gradient,
    zeros=npu.zeros,
    scale=npu.scale,
    sum_of_squares=npu.sum_of_squares,
    sum_over=npu.sum_over,
    gather_rows=npu.gather_rows,
    bf16=True,
    fp32_notice="fp32: flash attention on Ascend computes in bf16; the rest computes in fp32",
)

_KERNELS = {"cpu": CPU, "npu": NPU}


def kernels_for(device: str | None) -> Kernels:
    """Prepare MindSpore for a device, see `device.prepare`, and give its kernels."""
    return _KERNELS[prepare(device)]
