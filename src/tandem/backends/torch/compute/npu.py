"""What Ascend's devices compute with, through torch_npu: fused operators and their backward operators.

torch_npu has no float64 on the device. Its fused AdamW ignores `grad_scale` and `found_inf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from tandem.backends.torch.compute import cpu, cuda
from tandem.backends.torch.compute.cpu import split_heads
from tandem.models.config import ModelConfig

MOST_DOCUMENTS = 1024  # that one call of the attention operator takes
MASK_SIZE = 2048  # of the compressed causal mask that it wants, whatever the lengths
ANY_NUMBER = 2**31 - 1


def operators() -> Any:
    import torch_npu  # type: ignore[import-not-found]

    return torch_npu


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, w)


def add_product(target: torch.Tensor, first: bool, gradient: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    product = torch.mm(gradient.t(), x)
    if first and scale == 1.0:
        target.copy_(product)
    else:
        cpu.add_to(target, first, product, scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return operators().npu_rms_norm(x, weight, eps)


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return operators().npu_rms_norm_backward(gradient, x, weight, scale)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """The operator takes no tensor without rows, which a rank's experts may have."""
    return operators().npu_swiglu(x, dim=-1) if len(x) else x.new_empty(0, x.shape[1] // 2)


def swiglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return operators().npu_swiglu_backward(gradient, x, dim=-1) if len(x) else torch.empty_like(x)


def weighted_swiglu(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (swiglu(x) * factors).to(x.dtype)


def weighted_swiglu_backward(
    gradient: torch.Tensor, x: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    active = swiglu(x)
    d_factors = (gradient * active).sum(1, keepdim=True, dtype=torch.float32)
    dx = swiglu_backward((gradient * factors).to(x.dtype), x)
    return dx, d_factors, (active * factors).to(x.dtype)


def rotary_heads(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys = (
        _rotated(x if weight is None else rms_norm(x, weight, eps)[0], cos, sin)
        for x, weight in zip(_contiguous_heads(qkv), (q_weight, k_weight))
    )
    return queries, keys


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
    parts: list[torch.Tensor] = []
    dweights: list[torch.Tensor | None] = []
    for gradient, x, weight in zip(gradients, _contiguous_heads(qkv), (q_weight, k_weight)):
        turned, dweight = _rotated(gradient.contiguous(), cos, -sin), None
        if weight is not None:
            turned, dweight = rms_norm_backward(turned, x, rms_norm(x, weight, eps)[1], weight, trained)
        parts.append(turned)
        dweights.append(dweight)
    return torch.cat([*parts, gradients[2]], dim=2), dweights[0], dweights[1]


def _contiguous_heads(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys, _ = split_heads(qkv)
    return queries.contiguous(), keys.contiguous()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [t, g, a, d] rotated by `angles`: the operator takes [1, t, heads, d]."""
    return operators().npu_rotary_mul(x.flatten(1, 2)[None], cos[None], sin[None])[0].view_as(x)


def angles(
    config: ModelConfig, positions: np.ndarray, on_device: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """[t, 1, kv_channels]: the operator wants an angle for each channel, and not for each pair of them."""
    cos, sin = cuda.angles(config, positions, on_device, dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, in groups of at most `MOST_DOCUMENTS`: where each ends, counted within its group."""

    ends: list[list[int]]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return [ends[-1] for ends in self.ends]


def documents(lengths: Sequence[int], starts: torch.Tensor) -> Documents:
    groups = [lengths[start : start + MOST_DOCUMENTS] for start in range(0, len(lengths), MOST_DOCUMENTS)]
    return Documents([np.cumsum(group).tolist() for group in groups])


@cache
def _causal_mask(device: torch.device) -> torch.Tensor:
    """True above the diagonal. One for each device: it is the same for every layer and batch."""
    return torch.triu(torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device), diagonal=1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Documents) -> torch.Tensor:
    parts = zip(packed.ends, q.split(packed.sizes), k.split(packed.sizes), v.split(packed.sizes))
    outputs = [_within(ends, *part) for ends, *part in parts]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


def _within(ends: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return operators().npu_fusion_attention(
        q,
        k,
        v,
        q.shape[1],
        "TND",
        atten_mask=_causal_mask(q.device),
        scale=q.shape[2] ** -0.5,
        pre_tockens=ANY_NUMBER,
        next_tockens=0,
        sparse_mode=3,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows are summed first: one fp32 sum over 10^8 squares would lose digits."""
    rows = [torch.linalg.vector_norm(tensor, dim=-1).flatten() if tensor.ndim > 1 else tensor for tensor in tensors]
    return torch.linalg.vector_norm(torch.cat(rows))


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
    """Gradients are scaled before, because torch_npu's operator takes `grad_scale` and `found_inf`, and uses neither.

    So it is not called for a step that is skipped (`Kernels.update_skips`).
    """
    torch._foreach_mul_(gradients, coefficient)
    cpu.fused_adamw(weights, gradients, exp_avg, exp_avg_sq, step, None, None, **settings)
