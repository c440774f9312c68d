"""Prepares a run: checks everything that needs no device and no other process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tandem.backends import check_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.interface import TensorSource
from tandem.config.checks import check_batch_sizes, check_ranges, check_settings
from tandem.config.settings import CheckpointSettings, DataSettings, Settings, TrainingSettings
from tandem.data.datasets.blend import plain_paths
from tandem.data.preprocess.cache import is_raw
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import Problems, check_all
from tandem.files.publish import check_writable
from tandem.frameworks import check_framework
from tandem.launch.world import World
from tandem.models.config import ModelConfig
from tandem.parallel.grid import Grid
from tandem.training.logs.log import log_notice
from tandem.training.logs.loggers import check_loggers
from tandem.training.schedule import Schedule, schedule_from
from tandem.training.start.base import check_save_is_not_base
from tandem.training.start.data import Data, open_data, open_tokenizer
from tandem.training.start.data_paths import all_prefixes
from tandem.training.start.engine import engine_settings, make_grid
from tandem.training.start.epochs import check_epochs, with_epochs
from tandem.training.start.lora import config_to_train
from tandem.training.start.raw_data import check_ready, with_preprocessed
from tandem.training.start.resume import check_new_run, check_same_data, continued
from tandem.training.start.room import check_disk
from tandem.training.start.saved import check_place
from tandem.training.start.saved_schedule import with_saved_schedule
from tandem.training.start.state import TrainerState, check_optimizer, state_to_continue
from tandem.training.start.weights import check_model_flags, open_reference, open_weights


@dataclass(frozen=True, kw_only=True)
class ModelAndProcesses:
    """What a run starts with, except its data.

    Attributes:
        settings: as given by the user. In a `PreparedRun`, as the run records them (see `settle`).
        world: the place of this process among the processes of the run.
        grid: the place of each process in the layout.
        source: the weights, from the run's newest checkpoint if there is one, or else from `--load`.
        loading: the settings to load `source` with. `finetune` and similar flags are off if they were done before.
        state: how far the run was when `source` was saved; None when the run starts at iteration 0.
        tokenizer: None when neither the flags nor the weights have one.
    """

    settings: Settings
    framework: str
    world: World
    grid: Grid
    engine: EngineSettings
    source: TensorSource
    loading: CheckpointSettings
    state: TrainerState | None
    tokenizer: Tokenizer | None


@dataclass(frozen=True, kw_only=True)
class PreparedRun(ModelAndProcesses):
    """Everything that a run starts with."""

    schedule: Schedule
    data: Data

    @property
    def folder(self) -> Path | None:
        """The folder of `--save`; None when the run saves nothing."""
        return Path(self.settings.checkpoint.save) if self.settings.checkpoint.save else None

    def with_storage(self, checkpoint: CheckpointSettings) -> PreparedRun:
        """The same run with `no_shared_storage` as the disks of its machines are."""
        return replace(self, settings=replace(self.settings, checkpoint=checkpoint))

    def resumed_from(self, source: TensorSource) -> PreparedRun:
        """The same run with the weights of another iteration, for example when the newest ones are damaged."""
        if source is self.source:
            return self
        state = state_to_continue(source, self.loading)
        data = open_data(self.settings.data, self.settings.training, self.tokenizer, state)
        return replace(self, source=source, state=state, data=data)


def prepare(settings: Settings, world: World) -> PreparedRun:
    """Check everything that needs no device and no other process.

    The data come last. The first process of each machine preprocesses raw data, which may take hours. All other errors
    must appear before that.

    Raises:
        UserError: settings or files are missing, wrong or damaged.
    """
    return with_data(check_model_and_processes(settings, world))


def check_model_and_processes(settings: Settings, world: World) -> ModelAndProcesses:
    """Check the settings, also against the number of processes and the config of the weights.

    Raises:
        UserError: settings are missing, wrong, or contradict each other.
    """
    training, data, checkpoint = settings.training, settings.data, settings.checkpoint
    framework = check_framework(training.ai_framework).name
    check_ranges(settings.to_dict())  # what comes next divides by some
    problems = Problems()
    source = None
    with problems.noted():
        _check_before_weights(settings, world)
    if (checkpoint.load is None) != (checkpoint.init is None):  # or else that is said already
        with problems.noted():
            loading = continued(checkpoint)
            tokenizer_folder = data.tokenizer_name_or_path
            base = checkpoint.load if loading.load != checkpoint.load else None
            source = open_weights(loading, settings.lora, settings.model, tokenizer_folder, training.seed, base=base)
    if source is None:
        problems.raise_all()
    assert source is not None, "why it was not opened is a problem"
    with problems.noted():
        noop_layers = settings.parallel.layout.noop_layers
        check_model_flags(settings.model, settings.experts, data.seq_length, source.config, noop_layers)
    with problems.noted():
        grid, engine = _processes(settings, framework, source.config, world)
    for check in (
        partial(check_save_is_not_base, source, checkpoint),
        partial(open_reference, settings.preferences, source.config),
        partial(check_disk, settings, source),
        partial(_check_ready_data, data, checkpoint, loading),
        partial(check_optimizer, source, loading),
    ):
        with problems.noted():
            check()
    problems.raise_all()
    state = state_to_continue(source, loading)
    check_new_run(state, checkpoint.save)
    if state is not None and settings.optimizer.use_checkpoint_opt_param_scheduler:
        settings = with_saved_schedule(settings, source)
    return ModelAndProcesses(
        settings=settings,
        framework=framework,
        world=world,
        grid=grid,
        engine=engine,
        source=source,
        loading=loading,
        state=state,
        tokenizer=open_tokenizer(data.tokenizer_name_or_path, source),
    )


def _check_before_weights(settings: Settings, world: World) -> None:
    """Check everything that needs no weights. Only the first process logs."""
    data, training, save = settings.data, settings.training, settings.checkpoint.save
    check_all(
        lambda: check_settings(settings),
        lambda: check_epochs(data, training),
        lambda: check_ready(data),
        lambda: _check_processes(settings, world),
        *([lambda: check_writable(save, "--save"), lambda: check_place(save)] if save is not None else []),
        *([lambda: check_loggers(settings.logging)] if world.rank == 0 else []),
    )


def _check_ready_data(data: DataSettings, checkpoint: CheckpointSettings, loading: CheckpointSettings) -> None:
    """`check_same_data`, where no file is raw. What raw files become is known later."""
    if not any(map(is_raw, all_prefixes(data))):
        check_same_data(with_plain_paths(data), checkpoint, loading)


def _check_processes(settings: Settings, world: World) -> None:
    training, grid = settings.training, Grid(settings.parallel.layout, world.size)
    if training.final_batch_size % training.micro_batch_size == 0:  # or else that is said already
        check_batch_sizes(training, grid)


def _processes(settings: Settings, framework: str, config: ModelConfig, world: World) -> tuple[Grid, EngineSettings]:
    """The place of each process, and what the engine of this one is made with."""
    training, optimizer, parallel = settings.training, settings.optimizer, settings.parallel
    grid = make_grid(parallel, config, world.size)
    engine = engine_settings(training, optimizer, parallel, settings.experts, config, grid, world.rank)
    trained = config_to_train(config, settings.data.stage)
    check_engine(framework, trained, engine)
    if trained != config:
        log_notice(f"--stage {settings.data.stage}: the adapters' dropout is off, as in TRL")
    return grid, engine


def with_data(start: ModelAndProcesses) -> PreparedRun:
    """Preprocess raw data, and open everything that depends on the data."""
    settings = settle(start)
    return PreparedRun(
        **{**vars(start), "settings": settings},
        schedule=schedule_from(settings.optimizer, settings.training),
        data=open_data(settings.data, settings.training, start.tokenizer, start.state),
    )


def settle(start: ModelAndProcesses) -> Settings:
    """The settings as a run records them. They differ from the given ones in:

    - `data_path`: each path is in its shortest form;
    - `data_path` and `valid_data_path`: raw files are replaced by the prefixes of the preprocessed files;
    - `epochs`: None; `train_iters` is the number of steps instead;
    - `seed`: the seed of the checkpoint that is resumed, unless `--no-load-rng` is given.

    Raises:
        UserError: the checkpoint that is resumed was trained on other data; or as in preprocessing.
    """
    data = with_plain_paths(start.settings.data)
    data = with_preprocessed(data, start.tokenizer, leader=start.world.local_rank == 0)
    return settled(start, data, with_epochs(data, start.settings.training, start.state))


def with_plain_paths(data: DataSettings) -> DataSettings:
    """Each data path in its shortest form."""
    return replace(data, data_path=plain_paths(data.data_path))


def settled(start: ModelAndProcesses, data: DataSettings, training: TrainingSettings) -> Settings:
    """The settings that a run records, with its seed. Raises as `settle`.

    Args:
        data: with the prefixes of preprocessed files.
        training: with the number of steps.
    """
    check_same_data(data, start.settings.checkpoint, start.loading)
    seed = settled_seed(training.seed, start.loading, start.state)
    return replace(start.settings, data=data, training=replace(training, seed=seed))


def settled_seed(seed: int, loading: CheckpointSettings, state: TrainerState | None) -> int:
    """The seed of the run. A resumed run keeps the seed of its data order, unless `--no-load-rng` is given."""
    if state is None or loading.no_load_rng or state.seed == seed:
        return seed
    log_notice(f"seed {state.seed} from the checkpoint replaces --seed {seed} (--no-load-rng keeps yours)")
    return state.seed
