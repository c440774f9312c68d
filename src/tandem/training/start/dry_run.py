"""`--dry-run`: everything about a run that can be checked without a device, in seconds."""

from __future__ import annotations

import math
from pathlib import Path

from tandem.config.settings import Settings
from tandem.files.publish import check_free_space
from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count
from tandem.parallel.grid import Grid, held_shards
from tandem.training.start.banner import saving_notice
from tandem.training.start.data import all_prefixes, open_data, open_tokenizer, the_one_template
from tandem.training.start.data_checks import check_data
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.prepare import Ground, check_ground, with_data
from tandem.training.start.raw_data import describe_raw, raw_options, raw_templates


def dry_run(settings: Settings, processes: int) -> None:
    """Check a run of so many processes and print what it would do.

    Raises:
        UserError: settings, weights, data or disk would not do.
    """
    ground = check_ground(settings, processes)
    grid, config = ground.grid, ground.source.config
    held = [parameters_held(config, grid, rank) for rank in range(grid.size)]
    per_data_rank = settings.global_batch_size // grid.data_size
    lines = [
        f"{ground.framework}: {config.model_type}, {parameter_count(config):,} parameters from "
        f"{ground.source.location}",
        f"{grid.size} processes: tensor {grid.tensor_size} x pipeline {grid.pipeline_size} x data {grid.data_size}; "
        f"a rank holds {min(held):,} to {max(held):,} parameters",
        f"global batch {settings.global_batch_size} = {grid.data_size} data ranks x "
        f"{per_data_rank // settings.training.micro_batch_size} micro-batches x {settings.training.micro_batch_size} "
        f"samples of at most {settings.data.seq_length} tokens",
        *describe_data(settings, ground),
        *check_disk(settings, parameter_count(config)),
        "dry run: all of this can start; nothing was trained",
    ]
    print("\n".join(f"> {line}" for line in lines), flush=True)


def describe_data(settings: Settings, ground: Ground) -> list[str]:
    """Steps and samples, and what there is to say of the data; where some are raw, what becomes of their first rows,
    and what there is to say of the others."""
    tokenizer = open_tokenizer(settings, ground.source)
    if raw := raw_options(settings):
        kind, ready = kind_to_train(settings.data), [path for path in all_prefixes(settings) if path not in raw]
        checks = {path: check_data(path, kind, settings.data, tokenizer) for path in ready}
        the_one_template({p: template for p, (_, template) in checks.items()} | raw_templates(raw))
        return [*describe_raw(raw), *(notice for notices, _ in checks.values() for notice in notices)]
    settings = with_data(settings, ground).settings
    data = open_data(settings, tokenizer)
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in data.train.describe().items())
    return [
        f"{settings.length.iterations:,} steps over {settings.length.samples:,} samples; data: {counts}",
        *data.notices,
    ]


def parameters_held(config: ModelConfig, grid: Grid, rank: int) -> int:
    """Parameters that a rank computes with."""
    return sum(math.prod(shard.shape) for shard in held_shards(config, grid, grid.place(rank)))


def check_disk(settings: Settings, parameters: int) -> list[str]:
    """What the checkpoints need; an error when there is no room for one."""
    checkpoint = settings.checkpoint
    if checkpoint.save is None:
        return saving_notice(settings)
    half = settings.training.bf16 or settings.training.fp16
    weight = 2 if half else 4
    optimizer = 8 + (4 if half else 0)  # two moments; the fp32 masters of smaller weights
    needed = parameters * (weight + (0 if checkpoint.no_save_optim else optimizer))
    check_free_space(Path(checkpoint.save), needed)
    return [f"a checkpoint takes {needed / 1e9:,.2f} GB in {checkpoint.save}"]
