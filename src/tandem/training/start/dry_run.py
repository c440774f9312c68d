"""`--dry-run`: everything about a run that can be checked without a device, in seconds."""

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
    """Check a run of so many processes and print what it would do.

    Raises:
        UserError: settings, weights, data or disk would not do.
    """
    known = check_model_and_processes(settings, World(size=processes))
    grid, config = known.grid, known.source.config
    held = [parameters_held(config, grid, rank) for rank in range(grid.size)]
    batch, micro_batch = settings.training.final_batch_size, settings.training.micro_batch_size
    lines = [
        f"{known.framework}: {config.model_type}, {parameter_count(config):,} parameters from {known.source.location}",
        f"{grid.size} processes: tensor {grid.tensor_size} x pipeline {grid.pipeline_size} x data {grid.data_size}; "
        f"a rank holds {min(held):,} to {max(held):,} parameters",
        f"global batch {batch} = {grid.data_size} data ranks x "
        f"{batch // grid.data_size // micro_batch} micro-batches x {micro_batch} samples "
        f"of at most {settings.data.seq_length} tokens",
        *describe_data(known),
        *check_disk(settings.checkpoint, settings.training, parameter_count(config)),
        "dry run: all of this can start; nothing was trained",
    ]
    log.info("\n".join(f"> {line}" for line in lines))


def describe_data(known: ModelAndProcesses) -> list[str]:
    """Steps and samples, and what there is to say of the data; where some are raw, what becomes of their first rows,
    and what there is to say of the others."""
    data = known.settings.data
    if raw := raw_options(data, known.tokenizer):
        kind, ready = kind_to_train(data), [path for path in all_prefixes(data) if path not in raw]
        checks = {path: check_data(path, kind, data, known.tokenizer) for path in ready}
        common_template({p: template for p, (_, template) in checks.items()} | raw_templates(raw))
        return [*describe_raw(raw), *(notice for notices, _ in checks.values() for notice in notices)]
    run = with_data(known)
    length, counts = run.settings.training.length, run.data.train.describe()
    counted = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items())
    return [f"{length.iterations:,} steps over {length.samples:,} samples; data: {counted}", *run.data.notices]


def parameters_held(config: ModelConfig, grid: Grid, rank: int) -> int:
    """Parameters that a rank computes with."""
    return sum(math.prod(shard.shape) for shard in held_shards(config, grid, grid.place(rank)))


def check_disk(checkpoint: CheckpointSettings, training: TrainingSettings, parameters: int) -> list[str]:
    """What the checkpoints need; an error when there is no room for one."""
    if checkpoint.save is None:
        return saving_notice(checkpoint)
    half = training.bf16 or training.fp16
    weight = 2 if half else 4
    optimizer = 8 + (4 if half else 0)  # two moments; the fp32 masters of smaller weights
    needed = parameters * (weight + (0 if checkpoint.no_save_optim else optimizer))
    check_free_space(Path(checkpoint.save), needed)
    return [f"a checkpoint takes {needed / 1e9:,.2f} GB in {checkpoint.save}"]
