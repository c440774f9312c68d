"""`--dry-run`: checks in seconds everything about a run that needs no device."""

from __future__ import annotations

import math
from pathlib import Path

from tandem.config.settings import CheckpointSettings, Settings, TrainingSettings
from tandem.files.publish import check_free_space
from tandem.launch.world import World
from tandem.logs import log
from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count
from tandem.parallel.grid import Grid, held_shards
from tandem.training.start.banner import saving_notice
from tandem.training.start.data import common_template
from tandem.training.start.data_checks import check_data
from tandem.training.start.data_paths import all_prefixes
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.prepare import ModelAndProcesses, check_model_and_processes, with_data
from tandem.training.start.raw_data import describe_raw, raw_options, raw_templates


def dry_run(settings: Settings, processes: int) -> None:
    """Check a run with `processes` processes, and print what it would do.

    Raises:
        UserError: there is an error in the settings, weights or data, or too little disk space.
    """
    start = check_model_and_processes(settings, World(size=processes))
    grid, config = start.grid, start.source.config
    held = [parameters_held(config, grid, rank) for rank in range(grid.size)]
    batch, micro_batch = settings.training.final_batch_size, settings.training.micro_batch_size
    lines = [
        f"{start.framework}: {config.model_type}, {parameter_count(config):,} parameters from {start.source.location}",
        f"{grid.size} processes: tensor {grid.tensor_size} x pipeline {grid.pipeline_size} x data {grid.data_size}; "
        f"a rank holds {min(held):,} to {max(held):,} parameters",
        f"global batch {batch} = {grid.data_size} data ranks x "
        f"{batch // grid.data_size // micro_batch} micro-batches x {micro_batch} samples "
        f"of at most {settings.data.seq_length} tokens",
        *describe_data(start),
        *check_disk(settings.checkpoint, settings.training, parameter_count(config)),
        "dry run: all of this can start; nothing was trained",
    ]
    log.info("\n".join(f"> {line}" for line in lines))


def describe_data(start: ModelAndProcesses) -> list[str]:
    """Lines about steps, samples and data. Of raw files, the first rows are tried instead."""
    data = start.settings.data
    if raw := raw_options(data, start.tokenizer):
        kind, ready = kind_to_train(data), [path for path in all_prefixes(data) if path not in raw]
        checks = {path: check_data(path, kind, data, start.tokenizer) for path in ready}
        common_template({path: template for path, (_, template) in checks.items()} | raw_templates(raw))
        return [*describe_raw(raw), *(notice for notices, _ in checks.values() for notice in notices)]
    run = with_data(start)
    length, counts = run.settings.training.length, run.data.train.describe()
    count_texts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items())
    return [f"{length.iterations:,} steps over {length.samples:,} samples; data: {count_texts}", *run.data.notices]


def parameters_held(config: ModelConfig, grid: Grid, rank: int) -> int:
    """The number of parameters that a rank computes with."""
    return sum(math.prod(shard.shape) for shard in held_shards(config, grid, grid.place(rank)))


def check_disk(checkpoint: CheckpointSettings, training: TrainingSettings, parameters: int) -> list[str]:
    """A line about the size of a checkpoint.

    Raises:
        UserError: the disk has no room for a checkpoint.
    """
    if checkpoint.save is None:
        return saving_notice(checkpoint)
    half = training.bf16 or training.fp16
    weight = 2 if half else 4
    optimizer = 8 + (4 if half else 0)  # two moments, and fp32 master weights of 16-bit weights
    needed = parameters * (weight + (0 if checkpoint.no_save_optim else optimizer))
    check_free_space(Path(checkpoint.save), needed)
    return [f"a checkpoint takes {needed / 1e9:,.2f} GB in {checkpoint.save}"]
