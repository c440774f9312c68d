"""What NVIDIA's devices compute with: few kernels, and nothing that waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch.autograd import Function

from tandem.backends.torch.attention import Run, runs
from tandem.backends.torch.attention import attention as attention_by_runs
from tandem.backends.torch.compute import cpu, pure
from tandem.backends.torch.compute.fused import Fused
from tandem.models.config import ModelConfig

ALIGNMENT = 16  # bytes; what lies there can be read as any dtype
DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}  # of arrays that are copied

RMS_NORM = Fused(pure.rms_norm, kernels=1)
RMS_NORM_BACKWARD = Fused(pure.rms_norm_backward, kernels=3)
SWIGLU = Fused(pure.swiglu, kernels=1)
SWIGLU_BACKWARD = Fused(pure.swiglu_backward, kernels=1)
ROTARY_HEADS = Fused(pure.rotary_heads, kernels=2)
ROTARY_HEADS_BACKWARD = Fused(pure.rotary_heads_backward, kernels=3)
NORMALISED_ROTARY_HEADS = Fused(pure.normalised_rotary_heads, kernels=2)
NORMALISED_ROTARY_HEADS_BACKWARD = Fused(pure.normalised_rotary_heads_backward, kernels=7)
LOSSES_AND_GRADIENT = Fused(pure.losses_and_gradient, kernels=2)

FUSED = (
    RMS_NORM,
    RMS_NORM_BACKWARD,
    SWIGLU,
    SWIGLU_BACKWARD,
    ROTARY_HEADS,
    ROTARY_HEADS_BACKWARD,
    NORMALISED_ROTARY_HEADS,
    NORMALISED_ROTARY_HEADS_BACKWARD,
    LOSSES_AND_GRADIENT,
)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, w)


def add_product(target: torch.Tensor, first: bool, gradient: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    """One product, which adds to the fp32 target itself where cuBLAS can."""
    kept = 0.0 if first else 1.0
    if x.dtype == torch.float32:
        torch.addmm(target, gradient.t(), x, beta=kept, alpha=scale, out=target)
        return
    if _adds_in_fp32(x.device, x.dtype):
        torch.addmm(target, gradient.t(), x, out_dtype=torch.float32, beta=kept, alpha=scale, out=target)
        return
    if _multiplies_in_fp32(x.device, x.dtype):
        change = torch.mm(gradient.t(), x, out_dtype=torch.float32)
    else:
        change = torch.mm(gradient.t(), x)
    if first:
        torch.mul(change, scale, out=target)
    else:
        target.add_(change, alpha=scale)


@cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has products of 16-bit matrices that add to an fp32 one. It is tried once.

    PyTorch 2.8 and 2.9 take the arguments for a 16-bit target only.
    """
    target, x = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(target, x.t(), x, out_dtype=torch.float32, beta=1.0, alpha=2**-12, out=target)
    except (RuntimeError, TypeError):
        return False
    return float(target[0, 0]) == 1 + 2**-8  # which bf16 does not have


@cache
def _multiplies_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch gives products of 16-bit matrices in fp32. Before 2.8 it rounds them."""
    x = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return RMS_NORM(x, weight, eps)


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return RMS_NORM_BACKWARD(gradient, x, scale, weight)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    return SWIGLU(x)


def swiglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return SWIGLU_BACKWARD(gradient, x)


def rotary_heads(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if q_weight is None or k_weight is None:
        return ROTARY_HEADS(qkv, cos, sin)
    return NORMALISED_ROTARY_HEADS(qkv, q_weight, k_weight, eps, cos, sin)


def rotary_heads_backward(
    gradients: Sequence[torch.Tensor],
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    trained: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if q_weight is None or k_weight is None:
        return ROTARY_HEADS_BACKWARD(*gradients, cos, sin), None, None
    return NORMALISED_ROTARY_HEADS_BACKWARD(*gradients, qkv, q_weight, k_weight, eps, cos, sin)


def losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return LOSSES_AND_GRADIENT(logits, labels)


@dataclass(frozen=True)
class Documents:
    """The documents of a batch.

    Attributes:
        starts: where each begins, and the end of the last, int32 [documents + 1], on the device.
        longest: of their lengths.
        runs: the same documents, for dtypes that flash attention does not take.
    """

    starts: torch.Tensor
    longest: int
    runs: list[Run]


def documents(lengths: Sequence[int], starts: torch.Tensor) -> Documents:
    return Documents(starts, max(lengths), runs(lengths))


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """All arrays in one transfer that the host does not wait for, from memory that does not move."""
    places = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    host = pinned(places[-1])
    for place, array in zip(places, arrays):
        host.numpy()[place : place + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    there = host.to(device, non_blocking=True)
    return [
        there[place : place + array.nbytes].view(DTYPES[array.dtype.name]).view(array.shape)
        for place, array in zip(places, arrays)
    ]


def pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class CopyStream:
    """A stream on which a device copies while it computes on another."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def begin(self, copy: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
        """Copy now. The function that is returned lets the stream that computes wait for it, but not the host."""
        with torch.cuda.stream(self._stream):
            tensors = copy()
        copied = self._stream.record_event()

        def arrived() -> list[torch.Tensor]:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(computing)  # its memory is not used again before that stream is done with it
            return tensors

        return arrived


copy_stream = cache(CopyStream)  # of a device


def early(copy: Callable[[], list[torch.Tensor]], device: torch.device) -> Callable[[], list[torch.Tensor]]:
    return copy_stream(device).begin(copy)


def angles(
    config: ModelConfig, positions: np.ndarray, on_device: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """From a table on the device, which is as long as the model's positions, or a power of two beyond."""
    length = max(config.max_position_embeddings, 2 ** int(positions.max(initial=0)).bit_length())
    cos, sin = _angle_table(config, length, on_device.device, dtype)
    return cos.index_select(0, on_device), sin.index_select(0, on_device)


@lru_cache(maxsize=4)
def _angle_table(
    config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = np.arange(length)
    return cpu.angles(config, positions, torch.empty(0, device=device), dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Documents) -> torch.Tensor:
    """Flash attention over documents of any lengths, in one call.

    It takes 16-bit numbers only. In fp32 each length has its own call, with keys and values repeated for each query
    head: the kernel whose memory is linear in t does not share them.
    """
    if q.dtype != torch.float32:
        return _Flash.apply(q, k, v, packed.starts, packed.longest).flatten(1)
    repeats = q.shape[1] // k.shape[1]
    return attention_by_runs(q, k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), packed.runs)


def attention_over_kept(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Not by cuDNN, which makes a plan for each number of keys that it has not seen, in about a second."""
    was_allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return cpu.attention_over_kept(queries, keys, values, mask)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_allowed)


class _Flash(Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int
    ) -> torch.Tensor:
        output, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, output, sums, starts, state, unused)
        ctx.longest = longest
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, sums, starts, state, unused = ctx.saved_tensors
        longest = ctx.longest
        gradients = torch.ops.aten._flash_attention_backward(
            gradient.contiguous(), q, k, v, output, sums, starts, starts, longest, longest, 0.0, True, state, unused
        )
        return (*gradients, None, None)


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    norms = torch._foreach_norm(list(tensors))
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)


def adamw(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    step: int,
    coefficient: torch.Tensor,
    skip: torch.Tensor,
    **settings: float,
) -> None:
    """Without waiting for `skip` and `coefficient` to be known."""
    scale = (1.0 / coefficient).float()
    cpu.fused_adamw(weights, gradients, exp_avg, exp_avg_sq, step, scale, skip.float(), **settings)
