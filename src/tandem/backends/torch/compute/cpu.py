"""What a CPU computes with: little new memory, and pieces that stay in its caches.

Shapes: t tokens, n and k features. Activations are in the parameters' dtype; gradients of weights are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from tandem.backends.torch.attention import Run, runs
from tandem.frameworks import GRADIENT_PIECE
from tandem.models.config import ModelConfig
from tandem.models.rotary import cos_sin

# A product for a weight gradient is formed in pieces of at most this many numbers, which are added while in cache.
# glibc reuses blocks of this size; blocks above 32 MiB are new pages from the kernel each time.
PIECE = GRADIENT_PIECE

# A transposed view whose rows lie further apart than this in memory takes oneDNN two to three times as long.
_FAR = 2048

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [t, k] times w [n, k] transposed: [t, n], in new memory.

    In fp32 this uses oneDNN, which takes the widest vectors of every x86 processor. The MKL behind
    `torch.nn.functional.linear` takes half their width on AMD's. oneDNN does not accept empty matrices, and wide
    transposed ones slow it down. With a few rows it reads w with all threads, where MKL takes one.
    """
    is_far = w.stride(0) == 1 and w.stride(1) > _FAR
    if x.dtype == torch.float32 and _HAS_ONEDNN and x.numel() and not is_far:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.nn.functional.linear(x, w)


def add_product(target: torch.Tensor, first: bool, gradient: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    """Add scale * gradient^T x to target [n, k]; `first` overwrites it. gradient is [t, n], x [t, k]."""
    step = max(1, PIECE // x.shape[1])
    for start in range(0, gradient.shape[1], step):
        piece = product(gradient[:, start : start + step].t(), x.t())
        add_to(target[start : start + step], first, piece, scale)


def add_to(target: torch.Tensor, first: bool, gradient: torch.Tensor, scale: float) -> None:
    """Add scale * gradient to target, in fp32; `first` overwrites it."""
    if first:
        torch.mul(gradient.float(), scale, out=target)
    else:
        target.add_(gradient, alpha=scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x [..., k], and 1 / its root mean square, fp32 [..., 1]."""
    scale = _inverse_rms(x, eps)
    return (x * scale).mul_(weight).to(x.dtype), scale


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x and, where it is trained, of the weight. With y = x * scale:

    dweight = sum(gradient * y) over tokens, dx = scale * (gradient * weight - y * mean(gradient * weight * y)).
    """
    y = x * scale
    product = gradient * y
    dweight = product.reshape(-1, x.shape[-1]).sum(0) if trained else None
    mean = product.mul_(weight).mean(-1, keepdim=True)
    return (gradient * weight).sub_(y.mul_(mean)).mul_(scale).to(x.dtype), dweight


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """fp32 [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [t, 2n], gate then up -> [t, n]."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def swiglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.mul(gradient, silu(gate), out=dup)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=dgate)
    return dx


def rotary_heads(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [t, groups, queries per group, d] and keys [t, groups, 1, d] of qkv, normalised and rotated."""
    queries, keys, _ = split_heads(qkv)
    rotated = []
    for x, weight in ((queries, q_weight), (keys, k_weight)):
        y = x if weight is None else (x * _inverse_rms(x, eps)).mul_(weight)
        rotated.append(_rotate(y, cos, sin, torch.empty(x.shape, dtype=x.dtype, device=x.device)))
    return rotated[0], rotated[1]


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
    """The gradients of qkv and, where they are trained, of the weights, from those of queries, keys and values."""
    dqkv = torch.empty_like(qkv)
    *heads, _ = split_heads(qkv)
    *targets, dvalues = split_heads(dqkv)
    dvalues.copy_(gradients[2])
    dweights: list[torch.Tensor | None] = []
    for x, weight, gradient, target in zip(heads, (q_weight, k_weight), gradients, targets):
        if weight is None:
            _rotate(gradient, cos, -sin, target)
            dweights.append(None)
        else:
            rotated = _rotate(gradient, cos, -sin, torch.empty_like(gradient))
            dx, dweight = rms_norm_backward(rotated, x, _inverse_rms(x, eps), weight, trained)
            target.copy_(dx)
            dweights.append(dweight)
    return dqkv, dweights[0], dweights[1]


def split_heads(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of [t, groups, queries per group + 2, d]: queries, key, value of each group."""
    return qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1:]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of channels of x [t, g, a, d] by its angle, into `out`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's -log softmax(logits)[label], fp32 [t, 1], and the gradient of their sum, in place of the logits."""
    logits = logits.float()
    label_logits = logits.gather(1, labels[:, None])
    peak, where = logits.max(dim=1, keepdim=True)
    probabilities = torch.softmax(logits, dim=1, out=logits)
    # log sum exp(logits) = peak - log softmax(peak), which is exact to rounding: the peak's share is never tiny.
    losses = peak - probabilities.gather(1, where).log_() - label_logits
    probabilities.scatter_add_(1, labels[:, None], probabilities.new_full((1, 1), -1.0).expand(len(labels), 1))
    return losses, probabilities


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copies of arrays: tokens may lie in a file that is mapped read-only."""
    return [torch.tensor(array, device=device) for array in arrays]


def early(copy: Callable[[], list[torch.Tensor]], device: torch.device) -> Callable[[], list[torch.Tensor]]:
    """A function that returns what `copy` does. A CPU copies when that is called."""
    return copy


def angles(
    config: ModelConfig, positions: np.ndarray, on_device: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles of positions [t], which are on the device, too: [t, 1, kv_channels / 2]."""
    half = config.kv_channels // 2
    cos, sin = (
        torch.from_numpy(np.ascontiguousarray(of_positions[:, None, :half])).to(on_device.device, dtype)
        for of_positions in cos_sin(config, positions)
    )
    return cos, sin


def documents(lengths: Sequence[int], starts: torch.Tensor) -> list[Run]:
    """What `attention` takes, from the documents' lengths, and where each begins, on the device."""
    return runs(lengths)


def attention_over_kept(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention [1, groups, n, d] of queries [1, groups, n, d] over keys and values [1, groups, t, d].

    Args:
        mask: which of the keys each query attends to, [n, t]; all of them without it.
    """
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all tensors, float64. Rows are summed first: one fp32 sum over 10^8 squares would lose digits."""
    rows = [torch.linalg.vector_norm(tensor, dim=-1).flatten() for tensor in tensors]
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64)


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
    """Update number `step`, from 1, of fp32 weights with their gradients times `coefficient`; none where `skip` is 1.

    Both are tensors of no dimensions.

    Args:
        settings: as `fused_adamw` takes them.
    """
    if not skip:
        scale = None if coefficient == 1.0 else (1.0 / coefficient).float()
        fused_adamw(weights, gradients, exp_avg, exp_avg_sq, step, scale, None, **settings)


def fused_adamw(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    step: int,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """PyTorch's kernel. It divides gradients by `grad_scale` while it reads them."""
    torch._fused_adamw_(
        weights,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        [torch.full((), float(step), device=weights[0].device)] * len(weights),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
