"""A whole training: opens everything, runs the trainer, closes everything."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

from tandem.backends import connect, create_engine, make_deterministic
from tandem.backends.interface import Engine
from tandem.checkpoints.hf.companions import with_tokenizer
from tandem.config.parsing import to_yaml
from tandem.config.settings import Settings
from tandem.errors import RunStopped
from tandem.files.places import same_place
from tandem.files.publish import write_text_atomically
from tandem.launch.member import placing
from tandem.launch.world import Communicator, World
from tandem.logs import log
from tandem.training.evaluation import Validation
from tandem.training.expert_load import ExpertWatch
from tandem.training.feed import Share
from tandem.training.guard import Guard
from tandem.training.logs.events import EventLog
from tandem.training.logs.expert_loads import EXPERT_LOADS, ExpertLoadsFile
from tandem.training.logs.log import IterationLog, StepRecord
from tandem.training.logs.loggers import LoggedRun, OnStep, step_loggers
from tandem.training.logs.summary import RunSummary
from tandem.training.loss_scale import LossScale
from tandem.training.objectives import Objective
from tandem.training.out_of_memory import naming_less_memory
from tandem.training.preferences import objective_of
from tandem.training.progress import Progress
from tandem.training.run_record import append_start, describe_start
from tandem.training.run_tasks import RunTasks, open_tasks
from tandem.training.saving.writer import CheckpointWriter, RunDescription, kinds_by_rows
from tandem.training.signals import StopSignals
from tandem.training.start.agreement import agree_on_start, agree_on_weights
from tandem.training.start.banner import print_banner
from tandem.training.start.base import base_record, check_base
from tandem.training.start.folder import lock_folder, lock_other_folders, settle_storage
from tandem.training.start.lora import config_to_train
from tandem.training.start.prepare import PreparedRun, prepare
from tandem.training.start.reference import with_reference
from tandem.training.start.resume import origin_of, origin_of_saved, restore_newest
from tandem.training.start.state import SETTINGS_FILE
from tandem.training.trainer import Intervals, Trainer


def train(settings: Settings, on_step: Callable[[StepRecord], None] | None = None) -> Trainer:
    """Run a whole training: pretraining, or fine-tuning when `data.is_instruction_dataset`.

    Returns:
        The trainer after its last step. Its engine holds the trained weights.

    Raises:
        UserError: settings or files are missing, wrong or damaged, or a step failed.
        RunStopped: a signal stopped the run. If steps were taken, it saved a checkpoint.
    """
    with naming_less_memory(settings), StopSignals() as signals, ExitStack() as held:
        with signals.leaving_at_once():
            lock_folder(settings.checkpoint, World.from_environment(), held)
            run = prepare(settings, World.from_environment())
        communicator = connect_processes(run)
        agree_on_start(communicator, run.settings, run.framework, run.source.config, run.tokenizer)
        run = run.with_storage(settle_storage(run.settings.checkpoint, communicator))
        lock_other_folders(run.settings.checkpoint, communicator, held)
        engine = create_engine(run.framework, config_to_train(run.source.config, run.settings.data.stage), run.engine)
        check_base(run.source, communicator)
        source, progress = restore_newest(engine, run.source, run.loading, communicator)
        agree_on_weights(communicator, engine, source)
        run = run.resumed_from(source)
        objective = objective_of(run.settings.data.stage, run.settings.preferences)
        if objective.needs_reference:
            run = with_reference(run, engine, communicator, progress)

        first = run.world.rank == 0
        if first and run.folder:
            append_start(run.folder, describe_start(run.settings, source, engine, progress.iteration, run.world.size))
        events = EventLog(run.folder if first else None)
        writer = open_writer(run, engine, communicator, events)
        summary = RunSummary(run.folder, answers=run.settings.data.is_instruction_dataset)
        listeners = [summary.step, *([on_step] if on_step else [])]
        with open_loggers(run, progress, listeners) if first else nullcontext() as log_step:
            tasks = open_tasks(run, engine, communicator)
            trainer = make_trainer(
                run, objective, engine, communicator, progress, signals, writer, log_step, tasks, events
            )
            if first:
                print_banner(run, trainer)
            with events.around(progress), placing(lambda: f"iteration {progress.iteration + 1}"):
                with writer or nullcontext():
                    trainer.run()
                communicator.close()
                for line in summary.lines():
                    log.info("> %s", line)
                if trainer.stopped:
                    when = f"after iteration {progress.iteration}"
                    raise RunStopped(f"stopped by {trainer.stopped} {when}; the same command goes on")
        if first:
            log.info("[after training is done] datetime: %s", time.strftime("%Y-%m-%d %H:%M:%S"))
        return trainer


def connect_processes(run: PreparedRun) -> Communicator:
    """Join the other processes of the run."""
    if run.settings.training.deterministic_mode:
        make_deterministic(run.framework)
    timeout = run.settings.parallel.distributed_timeout_minutes
    return connect(run.framework, run.world, run.engine.device, timeout)


def open_writer(
    run: PreparedRun, engine: Engine, communicator: Communicator, events: EventLog
) -> CheckpointWriter | None:
    """Open the folder of `--save`, and write the run's settings there; None when the run saves nothing."""
    checkpoint, folder, source = run.settings.checkpoint, run.folder, run.source
    if folder is None:
        return None
    resumes_here = source.folder is not None and same_place(str(source.folder.parent), str(folder))
    description = RunDescription(
        settings=to_yaml(run.settings),
        seed=run.settings.training.seed,
        data=run.data.identity,
        origin=origin_of_saved(source) if resumes_here else origin_of(checkpoint),
        template=run.data.template,
        companions=with_tokenizer(source.companions, run.settings.data.tokenizer_name_or_path),
        base=base_record(source, run.settings.lora, communicator),
    )
    if run.world.leads(shared_storage=not checkpoint.no_shared_storage):
        write_text_atomically(folder / SETTINGS_FILE, description.settings)
    return CheckpointWriter(
        folder,
        checkpoint,
        description,
        engine,
        run.grid,
        communicator,
        events,
        by_rows=kinds_by_rows(run.settings.parallel),
        resumed=source.iteration if resumes_here else None,
    )


def open_loggers(run: PreparedRun, progress: Progress, listeners: Sequence[OnStep]) -> AbstractContextManager[OnStep]:
    """Open the loggers of the first rank. Each step also goes to `listeners`."""
    logged = LoggedRun(run.framework, progress.iteration, run.folder, run.settings.to_dict())
    return step_loggers(run.settings.logging, logged, listeners)


def watch_experts(run: PreparedRun, engine: Engine, progress: Progress, events: EventLog) -> ExpertWatch | None:
    """Follow the experts of a model that has some. The first rank writes what it sees."""
    if engine.config.experts is None:
        return None
    path = run.folder / EXPERT_LOADS if run.folder and run.world.rank == 0 else None
    return ExpertWatch(events, ExpertLoadsFile(path, progress.iteration))


def make_trainer(
    run: PreparedRun,
    objective: Objective,
    engine: Engine,
    communicator: Communicator,
    progress: Progress,
    signals: StopSignals,
    writer: CheckpointWriter | None,
    on_step: OnStep | None,
    tasks: RunTasks | None,
    events: EventLog,
) -> Trainer:
    """The training loop with all its parts."""
    training, logging = run.settings.training, run.settings.logging
    return Trainer(
        engine=engine,
        grid=run.grid,
        communicator=communicator,
        train_data=run.data.train,
        validation=Validation(run.data.valid, training.final_batch_size, training.eval_batches),
        share=Share(training.micro_batch_size, run.grid.data_size, run.grid.place(run.world.rank).data),
        length=training.length,
        schedule=run.schedule,
        progress=progress,
        guard=Guard(training, progress.recent_losses),
        loss_scale=LossScale.of(training, progress.loss_scale),
        intervals=Intervals(
            evaluation=training.eval_interval,
            save=run.settings.checkpoint.save_interval,
            exit=training.exit_interval,
            exit_minutes=training.exit_duration_in_mins,
        ),
        log=IterationLog(logging.log_interval, logging.log_throughput),
        signals=signals,
        objective=objective,
        folder=run.folder,
        saver=writer,
        on_step=on_step,
        tasks=tasks,
        experts=watch_experts(run, engine, progress, events),
    )
