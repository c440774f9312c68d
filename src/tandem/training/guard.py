"""Which steps are to be trusted, and what happens after one that is not: stop, or skip it and count."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.backends.interface import StepResult
from tandem.config.settings import TrainingSettings
from tandem.errors import UserError

WINDOW = 100  # losses that a spike is measured against, as in Megatron
SHORTEST = 10  # with fewer, nothing is called a spike


@dataclass
class Guard:
    """Judges steps; the engine applies none that it objects to.

    Attributes:
        recent_losses: of the last applied steps, kept up to date in place; a resumed run needs them.
        skipped: consecutive steps that were not applied.
    """

    settings: TrainingSettings
    recent_losses: list[float]
    skipped: int = 0

    @property
    def loss_limit(self) -> float:
        """The largest loss that is no spike."""
        if not self.settings.check_for_spiky_loss or len(self.recent_losses) < SHORTEST:
            return math.inf
        return self.settings.spiky_loss_factor * sum(self.recent_losses) / len(self.recent_losses)

    def judge(self, result: StepResult) -> str | None:
        """What is wrong with a step; None when it was applied."""
        if result.applied:
            self.skipped = 0
            if self.settings.check_for_spiky_loss:
                self.recent_losses.append(result.loss)
                del self.recent_losses[:-WINDOW]
            return None
        self.skipped += 1
        if not math.isfinite(result.loss):
            return f"the loss is {result.loss}"
        if not math.isfinite(result.grad_norm):
            return f"the gradient norm is {result.grad_norm}"
        if result.loss <= 0:
            return f"the loss is {result.loss}, though tokens are trained"
        return f"the loss {result.loss:.4f} is a spike: above {self.loss_limit:.4f}, --spiky-loss-factor times the mean"

    def act(self, iteration: int, reason: str, details: str) -> str:
        """What to tell of a step that was skipped.

        Raises:
            UserError: the run is to stop.
        """
        said = f"iteration {iteration}: {reason}. Nothing was updated. {details}"
        if self.settings.on_bad_step == "stop" and not self.settings.no_check_for_nan_in_loss_and_grad:
            raise UserError(
                f"{said}. Try a lower --lr, look at this data, or pass over such steps with --on-bad-step skip"
            )
        if self.skipped > self.settings.max_consecutive_skips:
            raise UserError(f"{said}. These are {self.skipped} in a row, more than --max-consecutive-skips")
        return f"  skipped {said}"
