"""The state of a training run in a checkpoint, and how to restore it."""

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
    """Counters, position in the data, and random state. For the last three fields, see `Progress`.

    Only the order of the data is random. It is a function of `seed` and `data`, and `consumed_train_samples` is the
    position in it. These three are the whole random state.
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
        """The state in a checkpoint; None when no training run wrote it."""
        text = source.document(STATE_FILE)
        return None if text is None else cls(**json.loads(text))


def check_optimizer(source: TensorSource, checkpoint: CheckpointSettings) -> None:
    """Raise UserError when the run must load an optimizer and the checkpoint of a training run has none."""
    if checkpoint.finetune or checkpoint.no_load_optim or TrainerState.from_source(source) is None:
        return
    if missing := [kind for kind in OPTIMIZER_KINDS if kind not in source.kinds()]:
        raise UserError(
            f"{source.location} contains no optimizer ({', '.join(missing)} missing): "
            f"add --no-load-optim to start with a new one, or --finetune to start at iteration 0"
        )


def state_to_continue(source: TensorSource, checkpoint: CheckpointSettings) -> TrainerState | None:
    """The state that a run continues from; None when it starts at iteration 0."""
    return None if checkpoint.finetune else TrainerState.from_source(source)


def restore(engine: Engine, source: TensorSource, checkpoint: CheckpointSettings) -> Progress:
    """Load the weights. If `source` is a checkpoint of a training run to continue, also load its optimizer and state.

    Returns:
        The progress to continue from.

    Raises:
        UserError: a file is damaged.
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
