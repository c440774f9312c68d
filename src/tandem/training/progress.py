"""How far a run has come, and who saves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Progress:
    """Where a run stands; all that a resumed run needs beside tensors.

    Attributes:
        skipped_train_samples: of the consumed samples, those of steps that were not applied. As in Megatron, schedules
            do not move over them.
        recent_losses: what a spike is measured against.
        loss_scale: where the dynamic loss scale of fp16 stands (`LossScale.to_dict`).
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
    """Who saves a run: `tandem.training.saving.writer.CheckpointWriter`, which documents this."""

    @property
    def is_written(self) -> bool: ...

    def save(self, progress: Progress) -> None: ...

    def publish(self) -> None: ...
