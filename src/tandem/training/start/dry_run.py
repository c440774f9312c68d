"""`--dry-run`: checks in seconds everything about a run that needs no device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tandem.backends.update import moments_that_stand_still
from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import Settings, TrainingSettings
from tandem.data.preprocess.options import PreprocessOptions
from tandem.files.lock import check_unlocked
from tandem.launch.world import SingleProcess, World
from tandem.logs import log
from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count
from tandem.parallel.grid import Grid, Place
from tandem.parallel.layout import shards
from tandem.training.run_tasks import check_tasks
from tandem.training.schedule import schedule_from
from tandem.training.start.banner import (
    describe_adapters,
    describe_beginning,
    describe_objective,
    nothing_left,
    size_of_samples,
)
from tandem.training.start.base import check_base
from tandem.training.start.data import common_template, open_data
from tandem.training.start.data_checks import check_data
from tandem.training.start.data_paths import all_prefixes
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.epochs import with_epochs
from tandem.training.start.prepare import ModelAndProcesses, check_model_and_processes, settled, with_plain_paths
from tandem.training.start.raw_data import (
    as_in_cache,
    describe_raw,
    describe_ready,
    raw_options,
    raw_templates,
    was_preprocessed,
    with_preprocessed,
)
from tandem.training.start.reference import check_same_reference
from tandem.training.start.room import check_memory, checkpoint_bytes
from tandem.training.start.state import TrainerState

MOST_SAMPLES = 1_000_000  # of a longer run, the order of no more samples is drawn


def dry_run(settings: Settings, processes: int) -> None:
    """Check a run with `processes` processes, and print what it would do.

    Raises:
        UserError: there is an error in the settings, weights or data, or too little disk space.
    """
    if save := settings.checkpoint.save:
        check_unlocked(save, f"--save {save}")
    start = check_model_and_processes(settings, World(size=processes))
    check_base(start.source, SingleProcess())
    check_same_reference(settings, start.source, start.state)
    settings, template, data_lines = look_at_data(start)
    check_tasks(start, template)
    grid, config = start.grid, start.source.config
    held = parameters_held(config, grid)
    ends = nothing_left(settings.training, start.state)
    batch, micro_batch = settings.training.final_batch_size, settings.training.micro_batch_size
    experts = grid.layout.expert_size
    shared = f", experts shared by {experts} ranks" if experts > 1 else ""
    lines = [
        f"{start.framework}: {config.model_type}, {parameter_count(config):,} parameters from {start.source.location}",
        *describe_adapters(config),
        *describe_objective(settings),
        f"{grid.size} processes: tensor {grid.tensor_size} x pipeline {grid.pipeline_size} x data {grid.data_size}"
        f"{shared}; "
        f"a rank holds {min(held):,} to {max(held):,} parameters",
        f"global batch {batch} = {grid.data_size} data ranks x "
        f"{batch // grid.data_size // micro_batch} micro-batches x {micro_batch} samples "
        f"of at most {size_of_samples(settings.data)}",
        *check_memory(settings, config, grid),
        *data_lines,
        *moments_that_stand_still(start.engine),
        *describe_checkpoints(settings, start.source),
        *describe_beginning(settings, start.source, start.state),
        f"dry run: {'the run would end at once' if ends else 'all of this can start'}; nothing was trained",
    ]
    log.info("\n".join(f"> {line}" for line in lines))


def look_at_data(start: ModelAndProcesses) -> tuple[Settings, dict[str, Any] | None, list[str]]:
    """The settings as the run records them, the template of the data, and lines about steps, samples and data.

    Of raw files that are not preprocessed yet, the first rows are tried, and `epochs` stays.
    """
    data, training = with_plain_paths(start.settings.data), start.settings.training
    ready: dict[str, PreprocessOptions] = {}
    raw = raw_options(data, start.tokenizer)
    if not raw:
        data = with_preprocessed(data, start.tokenizer)
    elif start.state is not None or was_preprocessed(raw, data.data_cache_path):
        data, ready, raw = as_in_cache(data, raw)
    if not raw:
        training = with_epochs(data, training, start.state)
    settings = settled(start, data, training)
    if training.epochs is None:
        schedule_from(settings.optimizer, settings.training)  # its checks
    lines = [describe_ready(path, options) for path, options in ready.items()]
    template, more = _try_rows(settings, start, raw) if raw else _open(settings, start)
    return settings, template, [*lines, *more]


def _try_rows(
    settings: Settings, start: ModelAndProcesses, raw: Mapping[str, PreprocessOptions]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The template of the data, and lines about it, when some of it is raw."""
    data, training = settings.data, settings.training
    ready = [path for path in all_prefixes(data) if path not in raw]
    checks = {path: check_data(path, kind_to_train(data), data, start.tokenizer) for path in ready}
    template = common_template({path: template for path, (_, template) in checks.items()} | raw_templates(raw))
    if training.epochs is None:
        steps = f"{training.length.iterations:,} steps over {training.length.samples:,} samples"
    else:
        steps = f"--epochs {training.epochs:g}: the number of steps is known when the data are preprocessed"
    tried = describe_raw(raw.values(), data.data_cache_path)
    return template, [steps, *tried, *(line for lines, _ in checks.values() for line in lines)]


def _open(settings: Settings, start: ModelAndProcesses) -> tuple[dict[str, Any] | None, list[str]]:
    """The template of preprocessed data, and lines about it."""
    length = settings.training.length
    training, state = shortened(settings.training, start.state)
    opened = open_data(settings.data, training, start.tokenizer, state)
    counts = {name: value for name, value in opened.train.describe().items() if name not in ("samples", "epochs")}
    count_texts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items())
    epochs = length.samples / max(1, counts["samples_per_epoch"])
    steps = f"{length.iterations:,} steps over {length.samples:,} samples ({epochs:,.2f} epochs)"
    return opened.template, [f"{steps}; data: {count_texts}", *opened.notices]


def shortened(training: TrainingSettings, state: TrainerState | None) -> tuple[TrainingSettings, TrainerState | None]:
    """The same run, or a new and shorter one where it would take long to draw the order of all samples."""
    length = training.length
    if length.samples <= MOST_SAMPLES:
        return training, state
    # as long as an evaluation needs, so that its data are opened, too
    steps = max(1, MOST_SAMPLES // training.final_batch_size, min(training.eval_interval, length.iterations))
    return replace(training, train_iters=steps, train_samples=None, rampup_batch_size=None), None


def parameters_held(config: ModelConfig, grid: Grid) -> list[int]:
    """The number of parameters that each rank computes with. Shards are counted once, for all ranks that hold them."""
    counts: Counter[tuple[int, bool, int, int]] = Counter()
    for shard in shards(config, grid.layout, tied_head_copy=True):
        of_experts = bool(shard.spec.split.experts)
        counts[shard.pipeline_rank, of_experts, shard.tensor_rank, shard.expert_rank] += math.prod(shard.shape)

    def of_rank(place: Place) -> int:
        here = grid.expert_place(place)
        return counts[place.pipeline, False, place.tensor, 0] + counts[place.pipeline, True, here.tensor, here.expert]

    return [of_rank(grid.place(rank)) for rank in range(grid.size)]


def describe_checkpoints(settings: Settings, source: TensorSource) -> list[str]:
    """A line about the size of a checkpoint."""
    if settings.checkpoint.save is None:
        return []
    return [f"a checkpoint takes {checkpoint_bytes(settings, source) / 1e9:,.2f} GB in {settings.checkpoint.save}"]
