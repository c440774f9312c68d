"""From settings to a running trainer: open the weights, the data and the backend, and say what will happen."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from tandem.backends import check_framework, connect, create_engine, make_deterministic
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.hf import companion_files, companions_of
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.native import NativeSource
from tandem.checkpoints.publish import write_text_atomically
from tandem.checkpoints.random_init import RandomSource
from tandem.config.settings import Settings
from tandem.config.sources import departures, to_yaml
from tandem.errors import RunStopped, UserError
from tandem.models.config import ModelConfig, from_hf
from tandem.models.tensors import parameter_count
from tandem.parallel.grid import Grid
from tandem.parallel.job import placing
from tandem.parallel.world import Communicator, World
from tandem.training.events import EventLog
from tandem.training.inputs import Data, open_data, open_tokenizer, with_epochs
from tandem.training.log import StepRecord
from tandem.training.loggers import step_loggers
from tandem.training.raw_data import with_preprocessed
from tandem.training.resume import changes, continued, open_initial, restore_newest
from tandem.training.run_record import append_start, describe_start
from tandem.training.saving import CheckpointWriter
from tandem.training.schedule import Schedule, schedule_from
from tandem.training.signals import StopSignals
from tandem.training.state import SETTINGS_FILE, TrainerState
from tandem.training.trainer import Trainer

# Model flags that must equal what the weights' config.json says.
COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "norm_epsilon",
    "rotary_base",
)


def report(text: str) -> None:
    """What the user must know, said by the first rank."""
    if World.from_environment().rank == 0:
        print(f"> {text}", flush=True)


def train(settings: Settings, on_step: Callable[[StepRecord], None] | None = None) -> Trainer:
    """Run a whole training: pretraining, or fine-tuning when `data.is_instruction_dataset`.

    Returns:
        The trainer, after its last step, with the engine that holds the trained weights.

    Raises:
        UserError: something is missing, contradictory or damaged; nothing has been trained then.
        RunStopped: a signal ended the run, after it saved.
    """
    with StopSignals() as signals:
        return _train(settings, signals, on_step)


def _train(settings: Settings, signals: StopSignals, on_step: Callable[[StepRecord], None] | None) -> Trainer:
    world = World.from_environment()
    start = prepare(settings, world.size, leader=world.local_rank == 0)
    settings, source, grid = start.settings, start.source, start.grid
    if settings.training.deterministic_mode:
        make_deterministic(start.framework)
    communicator = connect(
        start.framework, world, settings.training.device, settings.parallel.distributed_timeout_minutes
    )
    resumed = None if start.loading.checkpoint.finetune else TrainerState.from_source(source)
    tokenizer = open_tokenizer(settings, source)
    data = open_data(settings, tokenizer, resumed)
    engine = create_engine(start.framework, source.config, engine_settings(settings, source.config, grid, world.rank))
    source, progress, state = restore_newest(engine, source, start.loading, communicator, report)
    if source is not start.source:
        data = open_data(settings, tokenizer, state)
    first = world.rank == 0
    folder = Path(settings.checkpoint.save) if settings.checkpoint.save and first else None
    if folder:
        append_start(folder, describe_start(settings, source, engine, progress.iteration, world.size))
    events = EventLog(folder)
    writer = open_writer(settings, source, engine, data, grid, communicator, events)
    with step_loggers(settings, progress.iteration, on_step) if first else nullcontext() as log_step:
        trainer = Trainer(
            engine,
            settings,
            start.schedule,
            data.train,
            data.valid,
            progress,
            grid,
            communicator,
            saver=writer,
            signals=signals,
            on_step=log_step,
        )
        if first:
            print_banner(settings, source, trainer, state, data.notices)
        with events.around(progress), placing(lambda: f"iteration {progress.iteration + 1}"):
            with writer or nullcontext():
                trainer.run()
            communicator.close()
            if trainer.stopped:
                when = f"after iteration {progress.iteration}"
                raise RunStopped(f"stopped by {trainer.stopped} {when}; the same command goes on")
    if first:
        print(f"[after training is done] datetime: {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    return trainer


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with, checked as far as one can without a device and without the other processes."""

    framework: str
    settings: Settings
    grid: Grid
    schedule: Schedule
    source: TensorSource
    loading: Settings  # by which `source` is loaded: the run's own newest checkpoint goes before `--load`


def prepare(settings: Settings, processes: int, leader: bool = True) -> Start:
    """Check the settings against each other, the number of processes and the weights' config; raw data are preprocessed
    by the `leader` of each machine.

    Raises:
        UserError: something is missing or contradictory.
    """
    framework = check_framework(settings.training.ai_framework)
    settings = with_epochs(with_preprocessed(settings, leader))
    settings.check()
    grid = Grid(settings.layout, processes)
    settings.check_grid(grid)
    schedule = schedule_from(settings)
    loading = continued(settings)
    source = open_weights(loading)
    check_model_flags(settings, source.config)
    grid.layout.check(source.config)
    seeded = with_checkpoint_seed(settings, loading, source)
    return Start(framework, seeded, grid, schedule, source, loading)


def open_weights(settings: Settings) -> TensorSource:
    """The source of the initial weights: `--load`, or random when asked for."""
    checkpoint = settings.checkpoint
    if checkpoint.load is not None:
        return open_initial(checkpoint.load, checkpoint.ckpt_step, report)
    folder = settings.model.hf_cfg_dir or settings.data.tokenizer_name_or_path
    if folder is None:
        raise UserError("--init random needs the model's config.json: give its folder with --hf-cfg-dir")
    companions = companions_of(folder)
    config = from_hf(companions.hf_config or {}, where=f"{folder}/config.json")
    if settings.model.init_method_std is not None:
        config = dataclasses.replace(config, init_method_std=settings.model.init_method_std)
    return RandomSource(config, settings.training.seed, companions=companions)


def check_model_flags(settings: Settings, config: ModelConfig) -> None:
    """Raise UserError, with both values, when a model flag contradicts the weights' config."""
    model = settings.model
    for name in COMPARED:
        given, actual = getattr(model, name), getattr(config, name)
        if given is not None and given != actual:
            raise UserError(f"--{name.replace('_', '-')} {given} contradicts the weights' config, which has {actual}")
    if model.untie_embeddings_and_output_weights and config.tied:
        raise UserError(
            "--untie-embeddings-and-output-weights contradicts the weights' config: its embeddings are tied"
        )
    if model.padded_vocab_size is not None and model.padded_vocab_size < config.vocab_size:
        raise UserError(f"--padded-vocab-size {model.padded_vocab_size} is below the vocabulary of {config.vocab_size}")
    bound = model.max_position_embeddings or config.max_position_embeddings
    if settings.data.seq_length > bound:
        raise UserError(f"--seq-length {settings.data.seq_length} is above max_position_embeddings {bound}")


def with_checkpoint_seed(settings: Settings, loading: Settings, source: TensorSource) -> Settings:
    """A resumed run keeps the seed of its data order, unless `--no-load-rng` or `--finetune`."""
    if loading.checkpoint.finetune or loading.checkpoint.no_load_rng:
        return settings
    state = TrainerState.from_source(source)
    if state is None or state.seed == settings.training.seed:
        return settings
    kept = f"seed {state.seed} from the checkpoint replaces --seed {settings.training.seed}"
    report(f"{kept} (--no-load-rng keeps yours)")
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, seed=state.seed))


def engine_settings(settings: Settings, config: ModelConfig, grid: Grid, rank: int) -> EngineSettings:
    optimizer, training = settings.optimizer, settings.training
    recompute = 0
    if training.recompute_granularity == "full":
        block = training.recompute_method == "block"
        recompute = min(training.recompute_num_layers or 0, config.num_layers) if block else config.num_layers
    return EngineSettings(
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=training.bf16,
        fp16=training.fp16,
        recompute_layers=recompute,
        device=training.device,
        grid=grid,
        rank=rank,
        sequence_parallel=settings.parallel.sequence_parallel,
        use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
        use_torch_fsdp2=settings.parallel.use_torch_fsdp2,
    )


def open_writer(
    settings: Settings,
    source: TensorSource,
    engine: Engine,
    data: Data,
    grid: Grid,
    communicator: Communicator,
    events: EventLog,
) -> CheckpointWriter | None:
    """Make the folder of `--save`, with the run's settings in it; None when the run saves nothing."""
    if settings.checkpoint.save is None:
        return None
    folder = Path(settings.checkpoint.save)
    if communicator.world.leads(shared_storage=not settings.checkpoint.no_shared_storage):
        write_text_atomically(folder / SETTINGS_FILE, to_yaml(settings))
    companions = gather_companions(settings, source)
    resumed = None
    if isinstance(source, NativeSource) and source.folder.parent.resolve() == folder.resolve():
        resumed = source.iteration
    return CheckpointWriter(
        folder,
        engine,
        settings,
        grid,
        communicator,
        companions,
        data.identity,
        data.template,
        resumed,
        events,
    )


def gather_companions(settings: Settings, source: TensorSource) -> Companions:
    """Config from the weights, tokenizer files from the tokenizer's folder when one is named."""
    folder = settings.data.tokenizer_name_or_path
    named = {path.name: path for path in source.companions.files}
    named |= {path.name: path for path in companion_files(folder)} if folder else {}
    return Companions(source.companions.hf_config, sorted(named.values()))


def format_notice(settings: Settings) -> list[str]:
    """What to say when a script asks for checkpoints in a format that training does not write."""
    if settings.checkpoint.save is None or settings.checkpoint.ckpt_format == "native":
        return []
    return [
        f"--ckpt-format {settings.checkpoint.ckpt_format}: training saves native checkpoints; "
        f"`tandem convert --ckpt-format torch` turns one into Megatron's"
    ]


def print_banner(
    settings: Settings,
    source: TensorSource,
    trainer: Trainer,
    state: TrainerState | None,
    notices: list[str],
) -> None:
    """Say what will run: framework, model, weights, data, batch, and what a resumed run has changed."""
    config, engine = source.config, trainer.engine
    given = [f"{group}: {' '.join(values)}" for group, values in departures(settings).items()]
    counts = trainer.train_data.describe()
    batch = settings.global_batch_size
    lines = [
        f"{settings.training.ai_framework}: {config.model_type}, {parameter_count(config):,} parameters, "
        f"{engine.param_dtype}, weights from {source.location}",
        f"data {' '.join(settings.data.data_path)}: "
        + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()),
        f"batch {batch} x {settings.data.seq_length} tokens, "
        f"{-(-counts['samples_per_epoch'] // batch):,} steps per epoch",
        *given,
        *engine.notices,
        *notices,
        *format_notice(settings),
    ]
    if state is not None:
        lines.append(f"resuming at iteration {state.iteration}, {state.consumed_train_samples:,} samples consumed")
        lines += changes(source, settings)
    print("\n".join(f"> {line}" for line in lines), flush=True)
