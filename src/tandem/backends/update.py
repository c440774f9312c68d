"""When a step is applied, by how much its gradients are clipped, and moments that bf16 cannot follow."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tandem.config.settings import AdamSettings

SMALLEST_CHANGE = 2**-8  # of a number in bf16, relative to it; a smaller one may round to none


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


def moments_that_stand_still(settings: AdamSettings) -> Iterator[str]:
    """A notice for each moment that is kept in bf16 and hardly decays, because each step's change is rounded away.

    >>> list(moments_that_stand_still(AdamSettings(exp_avg_sq_dtype="bf16", adam_beta2=0.95)))
    []
    """
    for flag, beta, dtype in (
        ("--adam-beta1", settings.adam_beta1, settings.exp_avg_dtype),
        ("--adam-beta2", settings.adam_beta2, settings.exp_avg_sq_dtype),
    ):
        if dtype == "bf16" and 1 - beta < SMALLEST_CHANGE:
            yield (
                f"{flag} {beta}: a moment in bf16 hardly decays, because rounding takes changes below "
                f"{SMALLEST_CHANGE:.2%} away; take {1 - 2 * SMALLEST_CHANGE:.2f} or less, or fp32 for the moment"
            )
