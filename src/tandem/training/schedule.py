"""Learning rate and weight decay as Megatron's `OptimizerParamScheduler` defines them, counted in samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.config.settings import Settings
from tandem.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All lengths are in samples.

    A step uses the rate at the number of samples consumed before it: with warm-up, step 1 uses
    `lr_warmup_init`.
    """

    max_lr: float
    min_lr: float
    warmup_init: float
    warmup_samples: int
    decay_samples: int
    style: str

    def lr(self, consumed_samples: int) -> float:
        """Rate of the step that begins after `consumed_samples`."""
        warmup = self.warmup_samples
        if warmup > 0 and consumed_samples <= warmup:
            return self.warmup_init + (self.max_lr - self.warmup_init) * consumed_samples / warmup
        if self.style == "constant":
            return self.max_lr
        if consumed_samples > self.decay_samples:
            return self.min_lr
        if self.style == "inverse-square-root":
            root = math.sqrt(max(warmup, 1)) / math.sqrt(max(consumed_samples, 1))
            return max(self.min_lr, self.max_lr * root)
        ratio = (consumed_samples - warmup) / (self.decay_samples - warmup)
        coefficient = 1.0 - ratio if self.style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1.0)
        return self.min_lr + coefficient * (self.max_lr - self.min_lr)


def schedule_from(settings: Settings) -> Schedule:
    """The schedule of a run.

    Raises:
        UserError: the warm-up is as long as the decay, or longer.
    """
    optimizer, training = settings.optimizer, settings.training
    assert optimizer.lr is not None
    assert training.train_iters is not None
    batch = settings.global_batch_size
    decay = (optimizer.lr_decay_iters or training.train_iters) * batch
    if optimizer.lr_warmup_fraction is not None:
        warmup = int(optimizer.lr_warmup_fraction * decay)
    else:
        warmup = optimizer.lr_warmup_iters * batch
    if warmup >= decay:
        raise UserError(
            f"the warm-up ({warmup} samples) must be shorter than the decay ({decay} samples): "
            f"lower --lr-warmup-iters or --lr-warmup-fraction"
        )
    return Schedule(
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_init=optimizer.lr_warmup_init,
        warmup_samples=warmup,
        decay_samples=decay,
        style=optimizer.lr_decay_style,
    )
