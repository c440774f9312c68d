"""What a run begins with, checked before a device or another process is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tandem.backends.interface import EngineSettings
from tandem.checkpoints.interface import TensorSource
from tandem.config.checks import check_batch_sizes, check_settings
from tandem.config.settings import CheckpointSettings, Settings
from tandem.data.datasets.blend import plain_paths
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.files.publish import check_writable
from tandem.frameworks import check_framework
from tandem.launch.world import World
from tandem.parallel.grid import Grid
from tandem.training.logs.log import log_notice
from tandem.training.schedule import Schedule, schedule_from
from tandem.training.start.data import Data, open_data, open_tokenizer
from tandem.training.start.engine import engine_settings, make_grid
from tandem.training.start.epochs import check_epochs, with_epochs
from tandem.training.start.raw_data import check_ready, with_preprocessed
from tandem.training.start.resume import check_same_data, continued
from tandem.training.start.state import TrainerState, state_to_continue
from tandem.training.start.weights import check_model_flags, open_weights


@dataclass(frozen=True, kw_only=True)
class ModelAndProcesses:
    """What a run begins with, but for its data.

    Attributes:
        settings: as they were given; those of a `PreparedRun` are as the run records them, see `settle`.
        world: this process among those of the run.
        grid: which process does what.
        source: the weights; those of the run's newest checkpoint go before those of `--load`.
        loading: as which `source` is loaded; its `finetune` and the like are off where that was done before.
        state: how far the run had come when `source` was saved; None when it begins at iteration 0.
        tokenizer: None where neither the flags nor the weights have one.
    """

    settings: Settings
    framework: str
    world: World
    grid: Grid
    source: TensorSource
    loading: CheckpointSettings
    state: TrainerState | None
    tokenizer: Tokenizer | None


@dataclass(frozen=True, kw_only=True)
class PreparedRun(ModelAndProcesses):
    """All that a run begins with."""

    engine: EngineSettings
    schedule: Schedule
    data: Data

    @property
    def folder(self) -> Path | None:
        """Where the run saves."""
        return Path(self.settings.checkpoint.save) if self.settings.checkpoint.save else None

    def going_on_from(self, source: TensorSource) -> PreparedRun:
        """The same run from another iteration's weights, as when the newest ones turn out to be damaged."""
        if source is self.source:
            return self
        state = state_to_continue(source, self.loading)
        data = open_data(self.settings.data, self.settings.training, self.tokenizer, state)
        return replace(self, source=source, state=state, data=data)


def prepare(settings: Settings, world: World) -> PreparedRun:
    """Check everything that can be checked without a device and without the other processes, the data last: raw data
    are preprocessed by the first process of each machine, which may take hours and must not end in an error that could
    have been told before.

    Raises:
        UserError: something is missing, contradictory or damaged.
    """
    return with_data(check_model_and_processes(settings, world))


def check_model_and_processes(settings: Settings, world: World) -> ModelAndProcesses:
    """Check the settings against each other, the number of processes and the weights' config.

    Raises:
        UserError: something is missing or contradictory.
    """
    training, data, checkpoint = settings.training, settings.data, settings.checkpoint
    framework = check_framework(training.ai_framework)
    check_settings(settings)
    framework.check(
        shards_weights=settings.parallel.use_torch_fsdp2,
        interleaves_stages=settings.parallel.num_layers_per_virtual_pipeline_stage is not None,
    )
    check_epochs(data, training)
    check_ready(data)
    check_batch_sizes(training, Grid(settings.parallel.layout, world.size))
    if checkpoint.save is not None:
        check_writable(checkpoint.save)
    loading = continued(checkpoint)
    source = open_weights(loading, settings.model, data.tokenizer_name_or_path, training.seed)
    check_model_flags(settings.model, data.seq_length, source.config)
    return ModelAndProcesses(
        settings=settings,
        framework=framework.name,
        world=world,
        grid=make_grid(settings.parallel, source.config, world.size),
        source=source,
        loading=loading,
        state=state_to_continue(source, loading),
        tokenizer=open_tokenizer(data.tokenizer_name_or_path, source),
    )


def with_data(known: ModelAndProcesses) -> PreparedRun:
    """Preprocess raw data, and settle and open what depends on the data."""
    settings = settle(known)
    training, config = settings.training, known.source.config
    return PreparedRun(
        **{**vars(known), "settings": settings},
        engine=engine_settings(
            training, settings.optimizer, settings.parallel, config, known.grid, rank=known.world.rank
        ),
        schedule=schedule_from(settings.optimizer, training),
        data=open_data(settings.data, training, known.tokenizer, known.state),
    )


def settle(known: ModelAndProcesses) -> Settings:
    """The settings as a run records them. They differ from those that were given in:

    - `data_path`: each path in its shortest spelling;
    - `data_path` and `valid_data_path`: in place of raw files the prefixes of what they became;
    - `epochs`: None, and `train_iters` the steps that they take;
    - `seed`: that of the checkpoint that the run goes on from, unless `--no-load-rng` asks for another.

    Raises:
        UserError: the run goes on from a checkpoint that was trained on other data; or as preprocessing.
    """
    settings = known.settings
    data = replace(settings.data, data_path=plain_paths(settings.data.data_path))
    data = with_preprocessed(data, known.tokenizer, leader=known.world.local_rank == 0)
    training = with_epochs(data, settings.training, known.state)
    check_same_data(data, settings.checkpoint, known.loading)
    seed = settled_seed(training.seed, known.loading, known.state)
    return replace(settings, data=data, training=replace(training, seed=seed))


def settled_seed(seed: int, loading: CheckpointSettings, state: TrainerState | None) -> int:
    """A run that goes on keeps the seed of its data order."""
    if state is None or loading.no_load_rng or state.seed == seed:
        return seed
    log_notice(f"seed {state.seed} from the checkpoint replaces --seed {seed} (--no-load-rng keeps yours)")
    return state.seed
