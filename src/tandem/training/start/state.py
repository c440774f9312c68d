"""The state of a training run in a checkpoint, and how to restore it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from tandem.backends.interface import Engine
from tandem.checkpoints.interface import TensorKind, TensorSource
from tandem.config.settings import CheckpointSettings
from tandem.data.kinds import CONVERSATIONS, TEXT
from tandem.errors import UserError
from tandem.training.progress import Progress

STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "settings.yaml"
WHAT_IS_LEFT = "The weights there can begin a new run, with --finetune and another --save"
OPTIMIZER_KINDS: tuple[TensorKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerState:
    """Counters, position in the data, and random state. For `skipped_train_samples` to `loss_scale`, see `Progress`.

    Only the order of the data is random. It is a function of `seed` and `data`, and `consumed_train_samples` is the
    position in it. These three are the whole random state.

    Attributes:
        origin: what the run first started from (`Origin`); empty in checkpoints that do not record it.
    """

    iteration: int
    consumed_train_samples: int
    optimizer_step: int
    seed: int
    data: dict[str, Any] = field(default_factory=dict)
    skipped_train_samples: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_scale: dict[str, float] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def kind_of_data(self) -> str | None:
        """The name of the kind of data that the run trained on; None when it is not recorded."""
        if "kind" in self.data or "is_instruction_dataset" not in self.data:
            return self.data.get("kind")
        return (CONVERSATIONS if self.data["is_instruction_dataset"] else TEXT).name  # an older checkpoint

    @classmethod
    def from_source(cls, source: TensorSource) -> TrainerState | None:
        """The state in a checkpoint; None when no training run wrote it.

        Raises:
            UserError: the state is damaged, or it is missing where a training run wrote the rest.
        """
        text = source.document(STATE_FILE)
        if text is None:
            if written := _written_by_training(source):
                raise UserError(
                    f"{source.location}: damaged: {STATE_FILE} is missing, and a training run wrote {written}. "
                    f"{WHAT_IS_LEFT}"
                )
            return None
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise UserError(f"{source.location}/{STATE_FILE}: damaged: {error}. {WHAT_IS_LEFT}") from error


def _written_by_training(source: TensorSource) -> str | None:
    """What only a training run writes into a checkpoint, in words; None when `source` has nothing of it."""
    if source.document(SETTINGS_FILE) is not None:
        return SETTINGS_FILE
    return "an optimizer" if has_optimizer(source) else None


def saved_settings(source: TensorSource) -> dict[str, dict[str, Any]] | None:
    """The settings that a training run stored with a checkpoint; None for any other source.

    Raises:
        UserError: they are damaged.
    """
    text = source.document(SETTINGS_FILE)
    if text is None:
        return None
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source.location}/{SETTINGS_FILE}: damaged: {error}. {WHAT_IS_LEFT}") from error
    if not isinstance(settings, dict) or not all(isinstance(group, dict) for group in settings.values()):
        raise UserError(f"{source.location}/{SETTINGS_FILE}: damaged: expected the settings of a run. {WHAT_IS_LEFT}")
    return settings


def has_optimizer(source: TensorSource) -> bool:
    """Whether the optimizer's state can be read from a checkpoint."""
    return set(OPTIMIZER_KINDS) <= set(source.kinds())


def check_optimizer(source: TensorSource, checkpoint: CheckpointSettings) -> None:
    """Raise UserError when the run must load an optimizer and the checkpoint of a training run has none."""
    if checkpoint.finetune or checkpoint.no_load_optim or TrainerState.from_source(source) is None:
        return
    if not has_optimizer(source):
        assert source.folder is not None, "a checkpoint of a training run has files"
        raise UserError(
            f"{source.location} contains no optimizer, as after --no-save-optim: add --no-load-optim to go on with "
            f"a new one. Or begin a new run with its weights: --load {source.folder.parent} --finetune, another --save"
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
