"""When a step is applied, and by how much its gradients are clipped."""

from __future__ import annotations

import math


def is_trusted(loss: float, grad_norm: float, loss_limit: float, *, may_be_zero: bool = False) -> bool:
    """Whether a step is applied. A mean loss of 0 over tokens means that something is broken; others `may_be_zero`.

    >>> is_trusted(loss=2.5, grad_norm=1.0, loss_limit=10.0), is_trusted(loss=0.0, grad_norm=1.0, loss_limit=10.0)
    (True, False)
    """
    return all(map(math.isfinite, (loss, grad_norm))) and loss <= loss_limit and (loss > 0 or may_be_zero)


def clip_coefficient(norm: float, clip_grad: float) -> float:
    """The factor that gradients are multiplied by, as in Megatron. A `clip_grad` of 0 turns clipping off.

    >>> round(clip_coefficient(norm=4.0, clip_grad=1.0), 3), clip_coefficient(norm=0.5, clip_grad=1.0)
    (0.25, 1.0)
    """
    return min(1.0, clip_grad / (norm + 1e-6)) if clip_grad > 0 else 1.0
