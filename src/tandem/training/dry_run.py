"""`--dry-run`: everything about a run that can be checked without a device, in seconds."""

from __future__ import annotations

import math
from pathlib import Path

from tandem.checkpoints.publish import check_free_space
from tandem.config.settings import Settings
from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count
from tandem.parallel.grid import Grid, held_shards
from tandem.training.banner import saving_notice
from tandem.training.inputs import open_data, open_tokenizer
from tandem.training.start import prepare


def dry_run(settings: Settings, processes: int) -> None:
    """Check a run of so many processes and print what it would do.

    Raises:
        UserError: settings, weights, data or disk would not do.
    """
    start = prepare(settings, processes)
    settings, grid, config = start.settings, start.grid, start.source.config
    data = open_data(settings, open_tokenizer(settings, start.source))
    held = [parameters_held(start.source.config, grid, rank) for rank in range(grid.size)]
    per_data_rank = settings.global_batch_size // grid.data_size
    lines = [
        f"{start.framework}: {config.model_type}, {parameter_count(config):,} parameters from {start.source.location}",
        f"{grid.size} processes: tensor {grid.tensor_size} x pipeline {grid.pipeline_size} x data {grid.data_size}; "
        f"a rank holds {min(held):,} to {max(held):,} parameters",
        f"global batch {settings.global_batch_size} = {grid.data_size} data ranks x "
        f"{per_data_rank // settings.training.micro_batch_size} micro-batches x {settings.training.micro_batch_size} "
        f"samples of at most {settings.data.seq_length} tokens",
        f"{settings.total_iters:,} steps over {settings.total_samples:,} samples; data: "
        + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in data.train.describe().items()),
        *data.notices,
        *check_disk(settings, parameter_count(config)),
        "dry run: all of this can start; nothing was trained",
    ]
    print("\n".join(f"> {line}" for line in lines), flush=True)


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
