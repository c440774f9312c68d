"""Decides which steps are bad, and what happens after a bad step: the run stops, or skips the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.backends.interface import StepResult
from tandem.config.settings import TrainingSettings
from tandem.errors import UserError

WINDOW = 100  # a spike is compared with the mean of this many losses, as in Megatron
SHORTEST = 10  # with fewer losses, no loss is called a spike


@dataclass
class Guard:
    """Checks each step. The engine does not apply bad steps: `loss_limit` tells it what a spike is.

    Attributes:
        recent_losses: losses of the last applied steps. The list is updated in place; checkpoints store it.
        skipped: number of steps in a row that were not applied.
    """

    settings: TrainingSettings
    recent_losses: list[float]
    skipped: int = 0

    @property
    def loss_limit(self) -> float:
        """The largest loss that is not a spike."""
        if not self.settings.check_for_spiky_loss or len(self.recent_losses) < SHORTEST:
            return math.inf
        mean = sum(self.recent_losses) / len(self.recent_losses)
        return self.settings.spiky_loss_factor * mean if mean > 0 else math.inf  # a loss may be below 0

    def judge(self, result: StepResult) -> str | None:
        """What is wrong with a step, as text; None when it was applied."""
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
        """The log line of a step that was skipped.

        Raises:
            UserError: the run must stop.
        """
        message = f"iteration {iteration}: {reason}. Nothing was updated. {details}"
        if self.settings.on_bad_step == "stop" and not self.settings.no_check_for_nan_in_loss_and_grad:
            raise UserError(
                f"{message}. Try a lower --lr, check these samples, or skip such steps with --on-bad-step skip"
            )
        if self.skipped > self.settings.max_consecutive_skips:
            raise UserError(f"{message}. These {self.skipped} bad steps in a row are more than --max-consecutive-skips")
        return f"  skipped {message}"
