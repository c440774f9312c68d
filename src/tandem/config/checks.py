"""Which settings a run can use: each number in its range, and no two that contradict each other.

Every check yields what is wrong, as text, so that one error lists everything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from tandem.config.settings import (
    CheckpointSettings,
    DataSettings,
    LoggingSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    PreferenceSettings,
    Settings,
    TaskSettings,
    TrainingSettings,
)
from tandem.errors import raise_all
from tandem.options import flag_of
from tandem.parallel.grid import Grid

# fmt: off
# Numbers that must be at least 1.
ONE_OR_MORE = {
    "max_position_embeddings", "padded_vocab_size", "make_vocab_size_divisible_by",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "context_parallel_size", "distributed_timeout_minutes", "nproc_per_node", "nnodes", "workers", "seq_length",
    "micro_batch_size", "global_batch_size", "train_iters", "train_samples",
    "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
    "loss_scale_window", "hysteresis", "max_consecutive_skips", "log_interval", "tensorboard_log_interval",
    "save_interval", "save_total_limit", "save_retain_interval", "export_hf_every", "tokens_per_batch",
    "eval_tasks_interval", "max_new_tokens",
}
# fmt: on
ABOVE_ZERO = {
    *("epochs", "loss_scale", "initial_loss_scale", "min_loss_scale"),
    *("dpo_beta", "orpo_beta", "simpo_beta", "kto_beta", "moe_expert_capacity_factor"),
}
BELOW_ONE = {"adam_beta1", "adam_beta2", "lr_warmup_fraction"}  # and not below 0
MINUS_ONE = {"first_k_dense_replace"}  # -1 is MindSpeed-LLM's word for none
LARGEST = {"seed": 2**32 - 1, "master_port": 65535}  # NumPy's and TCP's


def check_settings(settings: Settings) -> None:
    """Raise a UserError that lists all settings that are missing, out of range, or contradict each other."""
    raise_all(wrong_ranges(settings.to_dict()))
    raise_all(wrong_settings(settings))


def check_ranges(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for numbers out of range. `settings` holds plain values by group and name."""
    raise_all(wrong_ranges(settings))


def check_implemented(model: ModelSettings, parallel: ParallelSettings, data: DataSettings) -> None:
    """Raise UserError for settings that would change the computation and are not supported."""
    raise_all(not_implemented(model, parallel, data))


def check_batch_sizes(training: TrainingSettings, grid: Grid) -> None:
    """Raise UserError when the batch sizes do not divide over the data ranks of `grid`.

    With interleaved stages, each data rank takes as many micro-batches as there are stages, or a multiple of that.
    """
    divisor = training.micro_batch_size * grid.data_size
    parts = f"--micro-batch-size {training.micro_batch_size} x {grid.data_size} data-parallel ranks"
    if grid.layout.num_layers_per_virtual_pipeline_stage is not None:
        divisor *= grid.pipeline_size
        parts += f" x {grid.pipeline_size} interleaved pipeline stages"
    sizes: dict[str, tuple[int, ...]] = {"--global-batch-size": (training.final_batch_size,)}
    if training.rampup_batch_size is not None:
        sizes["--rampup-batch-size"] = training.rampup_batch_size[:2]
    raise_all(
        f"{flag} {' '.join(map(str, values))}: expected multiples of {parts} = {divisor}"
        for flag, values in sizes.items()
        if any(value % divisor for value in values)
    )


def wrong_ranges(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Numbers out of range. Numbers without a rule must be at least 0. All numbers must be finite."""
    for values in settings.values():
        for name, value in values.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and (expected := _expected(name, number)):
                    yield f"--{name.replace('_', '-')} {number}: expected {expected}"


def wrong_settings(settings: Settings) -> Iterator[str]:
    """Settings that are missing, or contradict others."""
    checkpoint = settings.checkpoint
    if not settings.data.data_path:
        yield "--data-path is required: the prefix that `tandem preprocess` wrote"
    if (checkpoint.load is None) == (checkpoint.init is None):
        yield "give either --load FOLDER with initial weights, or --init random to start from random ones"
    yield from _wrong_length(settings.training, settings.optimizer)
    yield from _wrong_rate(settings.optimizer)
    yield from _wrong_weight_decay(settings.optimizer)
    yield from settings.optimizer.wrong_moments()
    yield from _wrong_batch_size(settings.training)
    yield from _wrong_precision(settings.training)
    yield from _wrong_recompute(settings.training)
    yield from _wrong_profile(settings.logging, settings.checkpoint)
    yield from wrong_preferences(settings, (settings.data.stage,))
    yield from _wrong_tasks(settings.evaluation)
    yield from not_implemented(settings.model, settings.parallel, settings.data)
    if settings.training.spiky_loss_factor <= 1:
        yield f"--spiky-loss-factor {settings.training.spiky_loss_factor}: expected more than 1"


def _wrong_tasks(evaluation: TaskSettings) -> Iterator[str]:
    """Settings of `tandem evaluate`, which mean nothing in training."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("tasks", "task", "log_samples", "output")
        if getattr(evaluation, name)
    ]
    if given:
        yield f"{' '.join(given)}: belongs to `tandem evaluate`; --eval-tasks are asked during training"


def not_implemented(model: ModelSettings, parallel: ParallelSettings, data: DataSettings) -> Iterator[str]:
    """Settings that would change the computation and are not supported."""
    yield from _wrong_dropout(model)
    if parallel.context_parallel_size != 1:
        yield f"--context-parallel-size {parallel.context_parallel_size}: only 1 is supported"
    if data.tokenizer_type != "PretrainedFromHF":
        yield f"--tokenizer-type {data.tokenizer_type}: only PretrainedFromHF is supported"


def _wrong_dropout(model: ModelSettings) -> Iterator[str]:
    for name in ("attention_dropout", "hidden_dropout"):
        if value := getattr(model, name):
            flag = f"--{name.replace('_', '-')}"
            yield f"{flag} {value}: only 0 is supported, as no layer drops anything here; give {flag} 0"


def _wrong_length(training: TrainingSettings, optimizer: OptimizerSettings) -> Iterator[str]:
    """A run is measured in iterations or in samples, as in Megatron. All lengths then use the same unit. Epochs
    become iterations."""
    counts = {"--train-iters": training.train_iters, "--train-samples": training.train_samples}
    given = [f"{name} {value}" for name, value in (counts | {"--epochs": training.epochs}).items() if value]
    if not given:
        yield "--train-iters is required, or --train-samples or --epochs"
        return
    if len(given) > 1 and training.epochs:
        yield f"{' and '.join(given)} exclude each other: give one"
        return
    by_iterations = {
        "--train-iters": training.train_iters,
        "--lr-decay-iters": optimizer.lr_decay_iters,
        "--lr-wsd-decay-iters": optimizer.lr_wsd_decay_iters,
        "--lr-warmup-iters": optimizer.lr_warmup_iters or None,
    }
    by_samples = {
        "--train-samples": training.train_samples,
        "--lr-decay-samples": optimizer.lr_decay_samples,
        "--lr-wsd-decay-samples": optimizer.lr_wsd_decay_samples,
        "--lr-warmup-samples": optimizer.lr_warmup_samples or None,
        "--rampup-batch-size": training.rampup_batch_size,
    }
    by_steps = training.epochs is not None or training.train_iters is not None
    excluded, unit = (by_samples, "iters") if by_steps else (by_iterations, "samples")
    if misplaced := [flag for flag, value in excluded.items() if value is not None]:
        length = "--epochs" if training.epochs is not None else f"--train-{unit}"
        yield f"{' '.join(misplaced)}: cannot be used together with {length}"
        return
    wsd = optimizer.lr_wsd_decay_iters if unit == "iters" else optimizer.lr_wsd_decay_samples
    if optimizer.lr_decay_style == "WSD" and wsd is None:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}"
    if not training.epochs and not training.length.iterations:
        yield (
            f"--train-samples {training.train_samples}: expected at least {training.length.batch_sizes.at(0)}, the "
            f"samples of one step: give more, or a smaller --global-batch-size"
        )


def _wrong_rate(optimizer: OptimizerSettings) -> Iterator[str]:
    if optimizer.lr is None:
        yield "--lr is required"
    elif optimizer.min_lr > optimizer.lr:
        yield f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}"
    if optimizer.lr_warmup_fraction is not None and (optimizer.lr_warmup_iters or optimizer.lr_warmup_samples):
        yield "--lr-warmup-fraction and --lr-warmup-iters or --lr-warmup-samples exclude each other: give one"


def _wrong_weight_decay(optimizer: OptimizerSettings) -> Iterator[str]:
    ends = (optimizer.start_weight_decay, optimizer.end_weight_decay)
    if optimizer.weight_decay_incr_style == "constant":
        if ends != (None, None):
            yield "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style"
    elif None in ends or not 0 <= ends[0] <= ends[1]:  # type: ignore[operator]
        yield (
            f"--weight-decay-incr-style {optimizer.weight_decay_incr_style}: expected 0 <= --start-weight-decay <= "
            f"--end-weight-decay, got {ends[0]} and {ends[1]}"
        )


def _wrong_batch_size(training: TrainingSettings) -> Iterator[str]:
    micro, final = training.micro_batch_size, training.final_batch_size
    if final % micro:
        yield f"--global-batch-size {final}: expected a multiple of --micro-batch-size {micro}"
        return
    if training.rampup_batch_size is None:
        return
    start, increment, samples = training.rampup_batch_size
    if not 0 < start <= final or increment <= 0 or samples < 0 or (final - start) % increment:
        yield (
            f"--rampup-batch-size {start} {increment} {samples}: expected a first size that reaches "
            f"--global-batch-size {final} in whole increments"
        )
    elif start % micro or increment % micro:
        yield f"--rampup-batch-size {start} {increment}: expected multiples of --micro-batch-size {micro}"


def _wrong_precision(training: TrainingSettings) -> Iterator[str]:
    if training.fp16 and training.bf16:
        yield "--fp16 and --bf16 exclude each other: give one"


def _wrong_recompute(training: TrainingSettings) -> Iterator[str]:
    if training.recompute_method == "block" and training.recompute_num_layers is None:
        yield "--recompute-method block needs --recompute-num-layers"
    if training.recompute_granularity == "full" and training.recompute_method is None:
        yield "--recompute-granularity full needs --recompute-method uniform or block"


def _wrong_profile(logging: LoggingSettings, checkpoint: CheckpointSettings) -> Iterator[str]:
    if not logging.profile:
        return
    if not 0 <= logging.profile_step_start < logging.profile_step_end:
        yield (
            f"--profile-step-start {logging.profile_step_start} and --profile-step-end "
            f"{logging.profile_step_end}: expected 0 <= start < end"
        )
    if logging.profile_save_path is None and checkpoint.save is None:
        yield "--profile needs a folder for its files: give --save or --profile-save-path"


# What each stage of preferences takes; the others refuse it.
OF_STAGES = {
    "dpo": ("dpo_loss_type", "dpo_beta", "dpo_label_smoothing", "pref_ftx", "ref_model", "refer_model_iter"),
    "orpo": ("orpo_beta",),
    "simpo": ("simpo_beta", "gamma_beta_ratio", "simpo_loss_type", "simpo_label_smoothing"),
    "kto": ("kto_beta", "desirable_weight", "undesirable_weight", "ref_model", "refer_model_iter"),
}
PAIRED = ("dpo", "orpo", "simpo")


def of_other_stages(values: PreferenceSettings, given: Collection[str], stages: Sequence[str | None]) -> Iterator[str]:
    """Those of the settings in `given` that none of the stages takes, as texts. The default counts if it was given."""
    here = _in_words(stages)
    for name in dict.fromkeys(name for names in OF_STAGES.values() for name in names if name in given):
        takers = [stage for stage, names in OF_STAGES.items() if name in names]
        if not set(takers) & set(stages):
            value = getattr(values, name)
            yield f"{flag_of(name)} {value}: is for --stage {' or '.join(takers)}, and this is --stage {here}"


def wrong_stage(settings: Settings, given: Collection[str], command: str) -> Iterator[str]:
    """Those of the settings that somebody gave that are for another stage, as texts.

    A file with all of them, such as the record of a run, has chosen none. Evaluation takes its stage from the data.
    """
    every = {name for names in OF_STAGES.values() for name in names}
    if not every <= set(given) and (settings.data.stage or command != "evaluate"):
        yield from of_other_stages(settings.preferences, given, (settings.data.stage,))


def wrong_preferences(settings: Settings, stages: Sequence[str | None]) -> Iterator[str]:
    """What contradicts in the settings of preferences, as texts. `stages`: those whose loss is computed."""
    given = settings.preferences
    default, here = type(given)(), _in_words(stages)
    changed = [field.name for field in fields(given) if getattr(given, field.name) != getattr(default, field.name)]
    yield from of_other_stages(given, changed, stages)
    if settings.data.is_pairwise_dataset and not set(stages) <= set(PAIRED):
        yield f"--is-pairwise-dataset needs --stage {', '.join(PAIRED)}, which train on pairs; this is --stage {here}"
    for flag, loss_type, smoothing, users in (
        ("--dpo", given.dpo_loss_type, given.dpo_label_smoothing, ("sigmoid", "robust")),
        ("--simpo", given.simpo_loss_type, given.simpo_label_smoothing, ("sigmoid",)),
    ):
        if smoothing and loss_type not in users:
            yield f"{flag}-label-smoothing {smoothing}: {flag}-loss-type {loss_type} does not use it: leave it out"
        elif smoothing >= 0.5:
            yield f"{flag}-label-smoothing {smoothing}: expected less than 0.5"
    if "kto" in stages and not (given.desirable_weight or given.undesirable_weight):
        yield "--desirable-weight 0 and --undesirable-weight 0: nothing would be trained; one must be above 0"
    if set(stages) & set(OF_STAGES) and settings.lora.lora_dropout:
        yield (
            f"--lora-dropout {settings.lora.lora_dropout}: answers are compared without dropout with --stage {here}, "
            f"as in TRL: leave it out"
        )


def _in_words(stages: Sequence[str | None]) -> str:
    return " and ".join(dict.fromkeys(stage or "sft" for stage in stages))


def _expected(name: str, number: float) -> str | None:
    """What the number should be, as text; None when it is right."""
    if name in ONE_OR_MORE and number < 1:
        return "1 or more"
    if name in ABOVE_ZERO and not 0 < number < math.inf:
        return "a positive number"
    if name in BELOW_ONE and not 0 <= number < 1:
        return "a number from 0 to below 1"
    if not -(name in MINUS_ONE) <= number < math.inf:
        return "0 or more"
    largest = LARGEST.get(name, math.inf)
    return None if number <= largest else f"{largest} or less"
