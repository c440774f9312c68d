"""The lines that describe a run before its first step."""

from __future__ import annotations

from tandem.checkpoints.interface import TensorSource
from tandem.config.checks import OF_STAGES
from tandem.config.parsing import departures
from tandem.config.settings import CheckpointSettings, DataSettings, Settings, TrainingSettings
from tandem.config.without_effect import without_effect
from tandem.logs import log
from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count, trained_count
from tandem.training.schedule import schedule_from
from tandem.training.start.changes import changes, other_kind, other_rate
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.prepare import PreparedRun
from tandem.training.start.room import notices_of_disk
from tandem.training.start.state import TrainerState
from tandem.training.trainer import Trainer


def saving_notice(checkpoint: CheckpointSettings) -> list[str]:
    """Notices when nothing or only the end is saved, or a script asks for a format that training does not write."""
    if checkpoint.save is None:
        return ["--save is not given: nothing will be saved"]
    notices = []
    every, saved = checkpoint.export_hf_every, checkpoint.save_interval
    if saved is None:
        notices.append("--save-interval is not given: only the last step is saved")
    if every is not None and (saved is None or every % saved):
        notices.append(
            f"--export-hf-every {every}: only what is saved is exported: {_saved_steps(saved)}that is a multiple of "
            f"{every}"
        )
    if checkpoint.ckpt_format != "native":
        notices.append(
            f"--ckpt-format {checkpoint.ckpt_format}: training saves native checkpoints; convert one with "
            f"`tandem convert --ckpt-format torch`"
        )
    return notices


def _saved_steps(interval: int | None) -> str:
    """Which steps are saved, in words."""
    last = "the last step, if "
    return last if interval is None else f"each multiple of --save-interval {interval}, and {last}"


def long_notice(settings: Settings, config: ModelConfig) -> list[str]:
    """A notice when samples are longer than the model's config allows, as `--max-position-embeddings` asks."""
    length, most = settings.data.seq_length, config.max_position_embeddings
    if length <= most:
        return []
    return [
        f"--max-position-embeddings {settings.model.max_position_embeddings}: samples have up to {length} tokens, more "
        f"than the {most} that the weights' config allows. Exports keep {most}, and other programs may refuse longer "
        f"texts"
    ]


def unread_notice(source: TensorSource, checkpoint: CheckpointSettings) -> list[str]:
    """A notice when `--load` holds an optimizer's state that is not read, and a fresh start was not asked for."""
    places = source.unread_optimizer()
    if not places or checkpoint.finetune or checkpoint.no_load_optim:
        return []
    return [
        f"the optimizer's state of {source.location} ({', '.join(places)}) is not read: this run starts at iteration 0 "
        f"with a new optimizer"
    ]


def print_banner(run: PreparedRun, trainer: Trainer) -> None:
    """Log what will run: framework, model, weights, data, batch, and which settings of a resumed run have changed."""
    settings, state = run.settings, run.state
    config, engine = run.source.config, trainer.engine
    changed = [
        f"{group}: {' '.join(f'{name}={value}' for name, value in values.items())}"
        for group, values in departures(settings).items()
    ]
    counts = trainer.train_data.describe()
    batch = settings.training.final_batch_size
    lines = [
        f"{run.framework}: {config.model_type}, {parameter_count(config):,} parameters, "
        f"{engine.param_dtype}, weights from {run.source.location}",
        *describe_adapters(config),
        *describe_objective(settings),
        f"data {' '.join(settings.data.data_path)}: "
        + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()),
        f"batch {batch} x {size_of_samples(settings.data)}, "
        f"{-(-counts['samples_per_epoch'] // batch):,} steps per epoch",
        *changed,
        *engine.notices,
        *run.data.notices,
        *describe_beginning(settings, run.source, state),
    ]
    log.info("\n".join(f"> {line}" for line in lines))


def describe_beginning(settings: Settings, source: TensorSource, state: TrainerState | None) -> list[str]:
    """Lines about what a run goes on from, and what it will save, as `--dry-run` says it, too.

    Args:
        settings: as the run records them. Where `epochs` stands in them, the number of steps is not known yet.
        state: that the run continues from; None when it starts at iteration 0.
    """
    iteration = state.iteration if state else 0
    lines = [
        *without_effect(settings, has_experts=source.config.experts is not None),
        *long_notice(settings, source.config),
        *unread_notice(source, settings.checkpoint),
        *saving_notice(settings.checkpoint),
    ]
    knows_length = settings.training.epochs is None
    if knows_length:
        lines += notices_of_disk(settings, source, iteration)
    if state is None:
        return lines
    lines += nothing_left(settings.training, state)
    lines.append(f"resuming at iteration {state.iteration}, {state.consumed_train_samples:,} samples consumed")
    lines += other_kind(state, settings.data)
    if knows_length:
        lines += other_rate(source, state, schedule_from(settings.optimizer, settings.training))
    return [*lines, *changes(source, settings.to_dict())]


def nothing_left(training: TrainingSettings, state: TrainerState | None) -> list[str]:
    """A notice when a run that goes on from `state` ends at once."""
    if state is None or training.epochs is not None:
        return []
    last = training.length.iterations_from(state.iteration, state.consumed_train_samples)
    if state.iteration < last:
        return []
    return [
        f"nothing is left to train: the weights are from iteration {state.iteration:,} of {last:,}. Give "
        f"{_longer(training)} to go on, or another --save to begin a new run"
    ]


def size_of_samples(data: DataSettings) -> str:
    """The most tokens of a sample, in words: "2 x 64 tokens" for pairs."""
    sequences = len(kind_to_train(data).columns)
    return f"{f'{sequences} x ' if sequences > 1 else ''}{data.seq_length} tokens"


def describe_objective(settings: Settings) -> list[str]:
    """A line about what is minimised, where that is not the mean loss of tokens."""
    stage, given = settings.data.stage, settings.preferences
    if stage not in OF_STAGES:
        return []
    values = {name: getattr(given, name) for name in OF_STAGES[stage] if name != "ref_model"}
    line = f"{stage}: " + ", ".join(f"{name} {value}" for name, value in values.items())
    if "ref_model" in OF_STAGES[stage]:
        line += f"; the reference is {given.ref_model or 'the weights that the run begins with'}"
    return [line]


def describe_adapters(config: ModelConfig) -> list[str]:
    """A line about what is trained of a model with adapters, as PEFT prints it; none for other models."""
    if config.lora is None:
        return []
    trained, total = trained_count(config), parameter_count(config)
    return [
        f"{config.lora.kind}: r {config.lora.r}, alpha {config.lora.lora_alpha:g}, on {config.lora.modules}",
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}",
    ]


def _longer(training: TrainingSettings) -> str:
    """The setting that makes a run longer."""
    return "a larger --train-samples" if training.train_samples else "a larger --train-iters or --epochs"
