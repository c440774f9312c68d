"""What a checkpoint holds of a training run beside tensors, and restoring all of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from tandem.backends.interface import Engine
from tandem.checkpoints.interface import TensorKind, TensorSource
from tandem.config.settings import CheckpointSettings
from tandem.errors import UserError
from tandem.training.progress import Progress

STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "settings.yaml"
OPTIMIZER_KINDS: tuple[TensorKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerState:
    """Counters, data position and random state; `skipped_train_samples`, `recent_losses` and `loss_scale` as
    in `Progress`.

    The only randomness of a run is the order of its data, a function of `seed` and of `data`; the position in
    that order is `consumed_train_samples`. Together they are the whole random state.
    """

    iteration: int
    consumed_train_samples: int
    optimizer_step: int
    seed: int
    data: dict[str, Any] = field(default_factory=dict)
    skipped_train_samples: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_scale: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_source(cls, source: TensorSource) -> TrainerState | None:
        """The state in a checkpoint, or None when it was not written by a trainer."""
        text = source.document(STATE_FILE)
        return None if text is None else cls(**json.loads(text))


def check_optimizer(source: TensorSource, checkpoint: CheckpointSettings) -> None:
    """Raise UserError when the run wants an optimizer and the checkpoint of a trainer has none."""
    if checkpoint.finetune or checkpoint.no_load_optim or TrainerState.from_source(source) is None:
        return
    if missing := [kind for kind in OPTIMIZER_KINDS if kind not in source.kinds()]:
        raise UserError(
            f"{source.location} holds no optimizer ({', '.join(missing)} missing): "
            f"add --no-load-optim to start with a fresh one, or --finetune to start at iteration 0"
        )


def state_to_continue(source: TensorSource, checkpoint: CheckpointSettings) -> TrainerState | None:
    """What a run goes on from; None when it begins at iteration 0."""
    return None if checkpoint.finetune else TrainerState.from_source(source)


def restore(engine: Engine, source: TensorSource, checkpoint: CheckpointSettings) -> Progress:
    """Load weights and, when `source` was saved by a trainer and is not only to be fine-tuned, go on from there.

    Returns:
        The progress to continue from.

    Raises:
        UserError: something in it is damaged.
    """
    engine.load_weights(source)
    state = state_to_continue(source, checkpoint)
    if state is None:
        return Progress()
    if not checkpoint.no_load_optim:
        engine.load_optimizer(source, state.optimizer_step)
    return Progress(
        state.iteration,
        state.consumed_train_samples,
        state.skipped_train_samples,
        list(state.recent_losses),
        dict(state.loss_scale),
    )
