"""Functions that an accelerator computes in few kernels, once they are compiled.

They change nothing in place but a `target`, and compute in fp32 between reading and writing. On a CPU they give what
`cpu.py` gives, to rounding. Shapes are documented there.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), scale


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    y, gradient = x.float() * scale, gradient.float()
    product = gradient * y
    weighted = gradient * weight.float()
    dx = (weighted - y * (product * weight.float()).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), product.reshape(-1, x.shape[-1]).sum(0)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def swiglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    gradient, share = gradient.float(), torch.sigmoid(gate)
    dgate = gradient * up * share * (1 + gate * (1 - share))
    return torch.cat([dgate, gradient * gate * share], dim=-1).to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """fp32 x [t, g, a, d], each pair of channels rotated by its angle; cos and sin are [t, 1, d / 2]."""
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_heads(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys, _ = _split(qkv)
    return rotated(queries.float(), cos, sin).to(qkv.dtype), rotated(keys.float(), cos, sin).to(qkv.dtype)


def normalised_rotary_heads(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary_heads` of a model that normalises its heads."""
    queries, keys = (
        rotated(_normalised(x.float(), eps)[0] * weight.float(), cos, sin).to(qkv.dtype)
        for x, weight in zip(_split(qkv), (q_weight, k_weight))
    )
    return queries, keys


def rotary_heads_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient of qkv from those of its heads."""
    back = [rotated(gradient.float(), cos, -sin).to(dv.dtype) for gradient in (dq, dk)]
    return torch.cat([*back, dv], dim=2)


def normalised_rotary_heads_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of qkv and of both weights."""
    parts, dweights = [], []
    for gradient, x, weight in zip((dq, dk), _split(qkv), (q_weight, k_weight)):
        turned = rotated(gradient.float(), cos, -sin)
        y, scale = _normalised(x.float(), eps)
        product, weighted = turned * y, turned * weight.float()
        dx = (weighted - y * (product * weight.float()).mean(-1, keepdim=True)) * scale
        parts.append(dx.to(qkv.dtype))
        dweights.append(product.reshape(-1, x.shape[-1]).sum(0))
    return torch.cat([*parts, dv], dim=2), dweights[0], dweights[1]


def _split(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, key and value of each group: views of [t, groups, queries per group + 2, d]."""
    return qkv.split([qkv.shape[2] - 2, 1, 1], dim=2)


def _normalised(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def losses_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.float()
    total = torch.logsumexp(wide, dim=1, keepdim=True)
    column = labels.unsqueeze(1)
    losses = total - wide.gather(1, column)
    is_label = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0) == column
    return losses, ((wide - total).exp() - is_label.float()).to(logits.dtype)


def weighted_swiglu(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up * factors.float()).to(x.dtype)


def weighted_swiglu_backward(
    gradient: torch.Tensor, x: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up = x.float().chunk(2, dim=-1)
    gradient, factors, share = gradient.float(), factors.float(), torch.sigmoid(gate)
    active, weighted = gate * share * up, gradient * factors
    dgate = weighted * up * share * (1 + gate * (1 - share))
    dx = torch.cat([dgate, weighted * gate * share], dim=-1).to(x.dtype)
    return dx, (gradient * active).sum(1, keepdim=True), (active * factors).to(x.dtype)


def route(
    logits: torch.Tensor, chosen: torch.Tensor, tokens: int, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    peak = logits.amax(1, keepdim=True)
    total = peak + (logits - peak).exp().sum(1, keepdim=True).log()
    probabilities = (logits - total).exp()
    factors = (logits.gather(1, chosen) - total).exp()
    if normalise:
        factors = factors / factors.sum(1, keepdim=True)
    real = _real(logits, tokens)
    counts = (_is_chosen(logits, chosen).sum(1) * real).sum(0)
    return factors, probabilities, total, counts, (probabilities * real).sum(0), (total.square() * real).sum()


def route_backward(
    gradient: torch.Tensor,
    probabilities: torch.Tensor,
    total: torch.Tensor,
    chosen: torch.Tensor,
    slopes: torch.Tensor,
    slope_of_z: torch.Tensor,
    tokens: int,
    normalise: bool,
) -> torch.Tensor:
    d_chosen = gradient.float()
    if normalise:
        picked = probabilities.gather(1, chosen)
        picked_sum = picked.sum(1, keepdim=True)
        d_chosen = (d_chosen - (d_chosen * picked).sum(1, keepdim=True) / picked_sum) / picked_sum
    real = _real(probabilities, tokens)
    d_probabilities = (_is_chosen(probabilities, chosen) * d_chosen.unsqueeze(2)).sum(1) + slopes * real
    d_logits = probabilities * (d_probabilities - (d_probabilities * probabilities).sum(1, keepdim=True))
    return d_logits + probabilities * (2 * slope_of_z * total * real)


def _is_chosen(of_experts: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """1 where a token's choice [t, k] is an expert, else 0: fp32 [t, k, E]."""
    numbers = torch.arange(of_experts.shape[1], device=chosen.device)
    return (chosen.unsqueeze(2) == numbers).float()


def _real(of_tokens: torch.Tensor, tokens: int) -> torch.Tensor:
    """1 for the first `tokens` tokens, 0 for padding: fp32 [t, 1]."""
    return (torch.arange(len(of_tokens), device=of_tokens.device) < tokens).float().unsqueeze(1)


def sum_rows(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of x [n, h] at each line of places [s, k]: [s, h]."""
    rows = x.gather(0, places.flatten().unsqueeze(1).expand(-1, x.shape[1]))
    return rows.unflatten(0, places.shape).float().sum(1).to(x.dtype)


def set_products(target: torch.Tensor, products: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """target [E, o, i] becomes each expert's product [E, o, i]: 0 for one without rows. Rows end at `ends` [E]."""
    return target.copy_(_with_rows(products, ends))


def add_products(target: torch.Tensor, products: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The same, added."""
    return target.add_(_with_rows(products, ends))


def _with_rows(products: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """fp32; whatever an expert without rows has here, it becomes 0."""
    is_empty = ends == torch.nn.functional.pad(ends.narrow(0, 0, len(ends) - 1), (1, 0))
    return torch.where(is_empty.view(-1, 1, 1), 0.0, products.float())
