"""How far a run has come, and who saves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Progress:
    """How far a run has come: all that a resumed run needs, except tensors.

    Attributes:
        skipped_train_samples: consumed samples of steps that were not applied. As in Megatron, they do not count for
            the schedules.
        recent_losses: the losses that a spike is compared with.
        loss_scale: state of the dynamic loss scale of fp16 (`LossScale.to_dict`).
    """

    iteration: int = 0
    consumed_train_samples: int = 0
    skipped_train_samples: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_scale: dict[str, float] = field(default_factory=dict)

    @property
    def applied_train_samples(self) -> int:
        return self.consumed_train_samples - self.skipped_train_samples


class Saver(Protocol):
    """Saves a run. See `tandem.training.saving.writer.CheckpointWriter`."""

    @property
    def is_written(self) -> bool: ...

    def save(self, progress: Progress) -> None: ...

    def publish(self) -> None: ...
