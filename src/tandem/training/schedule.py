"""Learning rate and weight decay as Megatron's `OptimizerParamScheduler` defines them, counted in samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.config.settings import OptimizerSettings, TrainingSettings
from tandem.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All lengths are in samples, as in Megatron; `warmup_samples` need not be whole.

    A step uses the values at the number of samples consumed before it: with warm-up, step 1 uses `warmup_init`.
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
        if self.style == "WSD":
            annealed = consumed_samples - (self.decay_samples - self.wsd_samples)
            remaining = _remaining(self.wsd_style, annealed / self.wsd_samples) if annealed > 0 else 1.0
        else:
            remaining = _remaining(self.style, (consumed_samples - warmup) / (self.decay_samples - warmup))
        return self.min_lr + remaining * (self.max_lr - self.min_lr)

    def weight_decay(self, consumed_samples: int) -> float:
        """Weight decay of the step that begins after `consumed_samples`."""
        if self.weight_decay_style == "constant" or consumed_samples > self.weight_decay_samples:
            return self.end_weight_decay
        grown = 1.0 - _remaining(self.weight_decay_style, consumed_samples / self.weight_decay_samples)
        return self.start_weight_decay + grown * (self.end_weight_decay - self.start_weight_decay)


def _remaining(style: str, done: float) -> float:
    """How much of the way down is left, from 1 to 0, after the fraction `done`."""
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
        UserError: the warm-up is as long as the decay, or longer.
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
            f"the warm-up ({warmup:g} samples) must be shorter than the decay ({decay} samples): "
            f"lower --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction"
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
