"""The loss scale of fp16 training: gradients are multiplied by it, so that small ones do not become 0."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tandem.config.settings import TrainingSettings

GROWTH, BACKOFF = 2.0, 0.5


@dataclass
class LossScale:
    """A constant scale, or Megatron's dynamic scale (`DynamicGradScaler` of Megatron-core).

    The dynamic scale doubles after `window` steps without overflow. After `hysteresis` overflows it halves, and again
    at each further overflow until it doubles.

    >>> scale = LossScale(value=8.0, window=2)
    >>> scale.update(overflow=True)
    >>> scale.value
    4.0

    Attributes:
        value: the scale of the next step.
        window: None for a constant scale.
        minimum: smallest value of the dynamic scale.
        steps: steps without overflow since the last overflow or doubling.
        patience: how many overflows are left until the scale halves.
    """

    value: float = 1.0
    window: int | None = None
    minimum: float = 1.0
    hysteresis: int = 1
    steps: int = 0
    patience: int = 1

    @classmethod
    def of(cls, settings: TrainingSettings, saved: dict[str, float]) -> LossScale:
        """The scale that the settings ask for. `saved` is the `to_dict` of a checkpoint, empty for a new run."""
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
        """What a checkpoint stores; empty for a constant scale."""
        return {name: asdict(self)[name] for name in ("value", "steps", "patience")} if self.window else {}

    @property
    def may_fall(self) -> bool:
        """Whether an overflow is normal: it only shows that the scale is too large."""
        return self.window is not None and self.value > self.minimum

    def update(self, *, overflow: bool) -> None:
        """Change the scale after a step."""
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
