"""What a checkpoint holds of a training run beside tensors, and saving and restoring all of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.backends.interface import Engine
from tandem.checkpoints.interface import Companions, Kind, TensorSource
from tandem.checkpoints.native import PROMPT_FILE, NativeRankSink, NativeSource
from tandem.config.settings import Settings
from tandem.config.sources import to_yaml
from tandem.errors import UserError
from tandem.parallel.grid import Grid
from tandem.parallel.world import Communicator
from tandem.training.trainer import Progress

STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "settings.yaml"
OPTIMIZER_KINDS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerState:
    """Counters, data position and random state.

    The only randomness of a run is the order of its data, a function of `seed` and of `data`; the position in
    that order is `consumed_train_samples`. Together they are the whole random state.
    """

    iteration: int
    consumed_train_samples: int
    optimizer_step: int
    seed: int
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_source(cls, source: TensorSource) -> TrainerState | None:
        """The state in a checkpoint, or None when it was not written by a trainer."""
        if not isinstance(source, NativeSource) or not (source.folder / STATE_FILE).exists():
            return None
        return cls(**json.loads(source.document(STATE_FILE)))


@dataclass(frozen=True)
class CheckpointWriter:
    """Saves a run as native checkpoints.

    Args:
        grid, communicator: every rank has a writer, and all save at the same time.
        data: what defines the order of the samples, to be compared on resuming.
        template: the record's entry of the template trained on (None for plain text); generation and export use it.
    """

    folder: Path
    engine: Engine
    settings: Settings
    grid: Grid
    communicator: Communicator
    companions: Companions
    data: dict[str, Any]
    template: dict[str, Any] | None = None

    def save(self, progress: Progress) -> None:
        """Write one iteration; it becomes visible, and the newest, only when it is whole."""
        state = TrainerState(
            iteration=progress.iteration,
            consumed_train_samples=progress.consumed_train_samples,
            optimizer_step=self.engine.optimizer_step,
            seed=self.settings.training.seed,
            data=self.data,
        )
        documents = {STATE_FILE: state.to_json(), SETTINGS_FILE: to_yaml(self.settings)}
        if self.template is not None:
            documents[PROMPT_FILE] = json.dumps(self.template, indent=2) + "\n"
        kinds = self._kinds()
        sink = NativeRankSink(
            self.folder,
            self.engine.config,
            self.grid,
            kinds,
            progress.iteration,
            self.companions,
            documents,
            self.communicator,
            by_rows=self.settings.parallel.use_distributed_optimizer,
            shared_storage=not self.settings.checkpoint.no_shared_storage,
        )
        failure: Exception | None = None
        try:
            for kind, shard, tensor in self.engine.tensors():
                if kind in kinds:
                    sink.write_part(kind, shard, tensor)
            sink.finish()
        except (UserError, OSError) as error:  # told to the other ranks, and raised on all of them
            failure = error
        except BaseException:
            sink.abort()
            raise
        sink.publish(failure)
        if self.communicator.world.rank == 0:
            print(
                f"  successfully saved checkpoint from iteration {progress.iteration:7d} to {self.folder}", flush=True
            )

    def _kinds(self) -> dict[Kind, str]:
        kinds: dict[Kind, str] = {"model": self.engine.param_dtype}
        if not self.settings.checkpoint.no_save_optim:
            if self.engine.param_dtype != "float32":
                kinds["master"] = "float32"
            kinds |= dict.fromkeys(OPTIMIZER_KINDS, "float32")
        return kinds


def check_optimizer(source: TensorSource, settings: Settings) -> None:
    """Raise UserError when the run wants an optimizer and the checkpoint of a trainer has none."""
    if settings.checkpoint.finetune or settings.checkpoint.no_load_optim or TrainerState.from_source(source) is None:
        return
    if missing := [kind for kind in OPTIMIZER_KINDS if kind not in source.kinds()]:
        raise UserError(
            f"{source.location} holds no optimizer ({', '.join(missing)} missing): "
            f"add --no-load-optim to start with a fresh one, or --finetune to start at iteration 0"
        )


def restore(engine: Engine, source: TensorSource, settings: Settings) -> tuple[Progress, TrainerState | None]:
    """Load weights and, when `source` was saved by a trainer and is not only to be fine-tuned, go on from there.

    Returns:
        The progress to continue from, and the saved state (None for a fresh start).

    Raises:
        UserError: something in it is damaged.
    """
    engine.load_weights(source)
    state = None if settings.checkpoint.finetune else TrainerState.from_source(source)
    if state is None:
        return Progress(), None
    if not settings.checkpoint.no_load_optim:
        engine.load_optimizer(source, state.optimizer_step)
    return Progress(state.iteration, state.consumed_train_samples), state
