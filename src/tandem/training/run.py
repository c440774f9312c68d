"""A whole training: everything is opened, the trainer runs, everything is closed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from tandem.backends import connect, create_engine, make_deterministic
from tandem.backends.interface import Engine
from tandem.checkpoints.hf.companions import companion_files
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.config.parsing import to_yaml
from tandem.config.settings import Settings
from tandem.errors import RunStopped
from tandem.files.publish import write_text_atomically
from tandem.launch.member import placing
from tandem.launch.world import Communicator, World
from tandem.parallel.grid import Grid
from tandem.training.logs.events import EventLog
from tandem.training.logs.log import StepRecord
from tandem.training.logs.loggers import step_loggers
from tandem.training.run_record import append_start, describe_start
from tandem.training.saving.writer import CheckpointWriter
from tandem.training.signals import StopSignals
from tandem.training.start.banner import print_banner
from tandem.training.start.data import Data, open_data, open_tokenizer
from tandem.training.start.prepare import engine_settings, prepare, report
from tandem.training.start.resume import restore_newest
from tandem.training.start.state import SETTINGS_FILE, TrainerState
from tandem.training.trainer import Trainer


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
    is_here = source.folder is not None and source.folder.parent.resolve() == folder.resolve()
    return CheckpointWriter(
        folder,
        engine,
        settings,
        grid,
        communicator,
        companions,
        data.identity,
        data.template,
        source.iteration if is_here else None,
        events,
    )


def gather_companions(settings: Settings, source: TensorSource) -> Companions:
    """Config from the weights, tokenizer files from the tokenizer's folder when one is named."""
    folder = settings.data.tokenizer_name_or_path
    named = {path.name: path for path in source.companions.files}
    named |= {path.name: path for path in companion_files(folder)} if folder else {}
    return Companions(source.companions.hf_config, sorted(named.values()))
