"""Schedules of learning rate and weight decay, as in Megatron's `OptimizerParamScheduler`, measured in samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.config.settings import OptimizerSettings, TrainingSettings
from tandem.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate and weight decay of each step.

    All lengths are in samples, as in Megatron. `warmup_samples` may be a fraction. A step uses the values at the number
    of samples before it: with warm-up, step 1 uses `warmup_init`.

    >>> training = TrainingSettings(global_batch_size=2, train_iters=10)
    >>> schedule = schedule_from(OptimizerSettings(lr=1.0, lr_warmup_iters=2), training)
    >>> [schedule.lr(samples) for samples in (0, 2, 4, 20)]
    [0.0, 0.5, 1.0, 0.0]
    """

    max_lr: float
    min_lr: float
    warmup_init: float
    warmup_samples: float
    decay_samples: int
    style: str
    wsd_samples: int
    wsd_style: str
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_style: str
    weight_decay_samples: int

    def lr(self, consumed_samples: int) -> float:
        """Learning rate of the step that starts after `consumed_samples`."""
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
        if self.style == "WSD":
            annealed = consumed_samples - (self.decay_samples - self.wsd_samples)
            remaining = _remaining(self.wsd_style, annealed / self.wsd_samples) if annealed > 0 else 1.0
        else:
            remaining = _remaining(self.style, (consumed_samples - warmup) / (self.decay_samples - warmup))
        return self.min_lr + remaining * (self.max_lr - self.min_lr)

    def weight_decay(self, consumed_samples: int) -> float:
        """Weight decay of the step that starts after `consumed_samples`."""
        if self.weight_decay_style == "constant" or consumed_samples > self.weight_decay_samples:
            return self.end_weight_decay
        grown = 1.0 - _remaining(self.weight_decay_style, consumed_samples / self.weight_decay_samples)
        return self.start_weight_decay + grown * (self.end_weight_decay - self.start_weight_decay)


def _remaining(style: str, done: float) -> float:
    """The remaining part of a decay, from 1 to 0, when the fraction `done` is over."""
    if style == "linear":
        return 1.0 - done
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * done) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**done - 1.0
    assert style == "minus_sqrt"
    return 1.0 - math.sqrt(done)


def schedule_from(optimizer: OptimizerSettings, training: TrainingSettings) -> Schedule:
    """The schedule of a run.

    Raises:
        UserError: the warm-up is not shorter than the decay.
    """
    assert optimizer.lr is not None
    if training.train_iters is not None:
        batch = training.final_batch_size
        length = training.train_iters * batch
        decay = (optimizer.lr_decay_iters or training.train_iters) * batch
        warmup: float = optimizer.lr_warmup_iters * batch
        wsd = (optimizer.lr_wsd_decay_iters or 0) * batch
    else:
        assert training.train_samples is not None
        length = training.train_samples
        decay = optimizer.lr_decay_samples or length
        warmup = optimizer.lr_warmup_samples
        wsd = optimizer.lr_wsd_decay_samples or 0
    if optimizer.lr_warmup_fraction is not None:
        warmup = optimizer.lr_warmup_fraction * decay
    if warmup >= decay:
        raise UserError(
            f"warm-up of {warmup:g} samples: expected less than the decay, {decay} samples: lower --lr-warmup-iters, "
            f"--lr-warmup-samples or --lr-warmup-fraction"
        )
    constant = optimizer.weight_decay_incr_style == "constant"
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    return Schedule(
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_init=optimizer.lr_warmup_init,
        warmup_samples=warmup,
        decay_samples=decay,
        style=optimizer.lr_decay_style,
        wsd_samples=wsd,
        wsd_style=optimizer.lr_wsd_decay_style,
        start_weight_decay=optimizer.weight_decay if constant or start is None else start,
        end_weight_decay=optimizer.weight_decay if constant or end is None else end,
        weight_decay_style=optimizer.weight_decay_incr_style,
        weight_decay_samples=length,
    )
