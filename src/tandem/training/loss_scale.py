"""The loss scale of fp16 training: gradients are computed this much larger, so that small ones are not lost."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tandem.config.settings import TrainingSettings

GROWTH, BACKOFF = 2.0, 0.5


@dataclass
class LossScale:
    """Constant, or Megatron's dynamic scale (`DynamicGradScaler` of Megatron-core): it doubles after `window` steps
    without overflow, and halves at each overflow once `hysteresis` of them have come since it last grew.

    Attributes:
        value: the scale of the next step.
        window: None for a constant scale.
        minimum: the dynamic scale does not fall below it.
        steps: steps without overflow since the last overflow or growth.
        patience: overflows that are still tolerated at this scale, itself included.
    """

    value: float = 1.0
    window: int | None = None
    minimum: float = 1.0
    hysteresis: int = 1
    steps: int = 0
    patience: int = 1

    @classmethod
    def of(cls, settings: TrainingSettings, saved: dict[str, float]) -> LossScale:
        """As the settings say, from where a resumed run stood (`to_dict`)."""
        if not settings.fp16:
            return cls()
        if settings.loss_scale is not None:
            return cls(settings.loss_scale)
        scale = cls(
            settings.initial_loss_scale,
            settings.loss_scale_window,
            settings.min_loss_scale,
            settings.hysteresis,
            patience=settings.hysteresis,
        )
        if saved:
            scale.value, scale.steps, scale.patience = saved["value"], int(saved["steps"]), int(saved["patience"])
        return scale

    def to_dict(self) -> dict[str, float]:
        """What a resumed run needs; nothing for a constant scale."""
        return {name: asdict(self)[name] for name in ("value", "steps", "patience")} if self.window else {}

    @property
    def may_fall(self) -> bool:
        """Whether an overflow is no more than a sign that the scale is too large."""
        return self.window is not None and self.value > self.minimum

    def update(self, *, overflow: bool) -> None:
        """After a step."""
        if self.window is None:
            return
        if overflow:
            self.steps = 0
            self.patience -= 1
            if self.patience <= 0:
                self.value = max(self.value * BACKOFF, self.minimum)
            return
        self.steps += 1
        if self.steps == self.window:
            self.steps, self.patience = 0, self.hysteresis
            self.value *= GROWTH
