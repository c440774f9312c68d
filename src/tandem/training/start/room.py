"""Room for a run: the disk for its checkpoints, and the memory that `tandem plan` expects."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import LaunchSettings, Settings, TrainingSettings
from tandem.errors import UserError
from tandem.files.publish import check_free_space, nearest_folder
from tandem.frameworks import named_framework
from tandem.machine import has_accelerator, memory_bytes
from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count, trained_count
from tandem.parallel.grid import Grid
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import stage_memories
from tandem.training.start.base import saves_weights
from tandem.training.start.engine import recomputed_layers


def checkpoint_bytes(settings: Settings, source: TensorSource) -> int:
    """Bytes that one checkpoint adds to the disk of a machine.

    Args:
        source: the weights that the run starts from.
    """
    training, checkpoint, config = settings.training, settings.checkpoint, source.config
    half = training.bf16 or training.fp16
    weight = 2 if half else 4
    optimizer = settings.optimizer.moment_bytes + (4 if half else 0)  # and fp32 master weights of 16-bit weights
    trained = trained_count(config)
    saved = parameter_count(config) if saves_weights(source, settings.lora) else trained
    size = saved * weight + (0 if checkpoint.no_save_optim else trained * optimizer)
    return size // settings.launch.nnodes if checkpoint.no_shared_storage else size


def check_disk(settings: Settings, source: TensorSource) -> None:
    """Raise UserError when the disk has no room for a checkpoint."""
    if settings.checkpoint.save is not None:
        check_free_space(Path(settings.checkpoint.save), checkpoint_bytes(settings, source), "--save")


def notices_of_disk(settings: Settings, source: TensorSource, iteration: int) -> list[str]:
    """A notice when the disk will be full before the run ends.

    Args:
        settings: with the number of steps, also where `--epochs` gives it.
        source: the weights that the run starts from.
        iteration: where the run begins.
    """
    checkpoint = settings.checkpoint
    if checkpoint.save is None:
        return []
    size, free = checkpoint_bytes(settings, source), shutil.disk_usage(nearest_folder(checkpoint.save)).free
    count = len(set(_kept(settings, iteration)))
    if count * size <= free:
        return []
    return [
        f"the run keeps {count:,} checkpoints of {size / 1e9:,.2f} GB in {checkpoint.save}, and the disk has "
        f"{free / 1e9:,.2f} GB free: it is full after {free // size:,}. --save-total-limit keeps only the newest, "
        f"--save-interval saves less often"
    ]


def _kept(settings: Settings, iteration: int) -> Iterator[int]:
    """The iterations whose checkpoints are on the disk at the end of the run, and the one more while it saves."""
    last, checkpoint = settings.training.length.iterations, settings.checkpoint
    interval = checkpoint.save_interval or last
    saved = sorted({*range(iteration + interval - iteration % interval, last + 1, interval), last})
    limit, every = checkpoint.save_total_limit, checkpoint.save_retain_interval
    if limit is None and every is None:
        yield from saved
        return
    yield from saved[-((limit or 1) + 1) :]
    yield from (number for number in saved if every and number % every == 0)


def job_of(settings: Settings, config: ModelConfig, grid: Grid) -> Job:
    """The run, as `tandem plan` plans it."""
    training, parallel = settings.training, settings.parallel
    job = Job(
        config=config,
        layout=grid.layout,
        data_parallel_size=grid.data_size,
        sequence_parallel=parallel.sequence_parallel,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        use_torch_fsdp2=parallel.use_torch_fsdp2,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.final_batch_size,
        seq_length=settings.data.seq_length,
        stage=settings.data.stage,
        half=training.bf16 or training.fp16,
        moments=settings.optimizer,
        ai_framework=named_framework(training.ai_framework).name,
    )
    return replace(job, recompute_layers=recomputed_layers(training, max(job.layers_of_stages)))


def check_memory(settings: Settings, config: ModelConfig, grid: Grid) -> list[str]:
    """A line about the memory of the fullest rank, by the planner's estimate.

    Raises:
        UserError: the run would compute on this machine's processors, and they have too little memory.
    """
    if grid.layout.noop_layers:
        return []  # these are not planned
    peaks = [memory.peak for memory in stage_memories(job_of(settings, config, grid), HARDWARE["cpu"])]
    needed = sum(peaks[grid.place(rank).pipeline] for rank in _ranks_here(settings.launch, grid))
    here, on_cpu = memory_bytes(), computes_on_cpu(settings.training)
    if on_cpu and needed > here:
        raise UserError(
            f"the run needs about {needed / 1e9:,.1f} GB of memory (the estimate of `tandem plan`), and this machine "
            f"has {here / 1e9:,.1f} GB: {'; '.join(ways_to_less_memory(settings))}. For a run on another machine, "
            f"give its --device, cuda or npu"
        )
    line = f"a rank needs about {max(peaks) / 1e9:,.2f} GB of memory by the estimate of `tandem plan`"
    return [f"{line}; this machine has {here / 1e9:,.1f} GB" if on_cpu else f"{line}, which knows devices' sizes"]


def _ranks_here(launch: LaunchSettings, grid: Grid) -> range:
    """The ranks on this machine."""
    here = launch.nproc_per_node or grid.size
    return range(launch.node_rank * here, min(grid.size, (launch.node_rank + 1) * here))


def computes_on_cpu(training: TrainingSettings) -> bool:
    """Whether the run would compute on the processors of this machine."""
    return training.device == "cpu" or (training.device is None and not has_accelerator())


def ways_to_less_memory(settings: Settings) -> Iterator[str]:
    """What a run can still do to need less memory, by its settings."""
    training, parallel = settings.training, settings.parallel
    if training.micro_batch_size > 1:
        yield f"a smaller --micro-batch-size than {training.micro_batch_size} (the global batch stays)"
    yield f"a smaller --seq-length than {settings.data.seq_length}"
    if training.recompute_granularity is None:
        yield "--recompute-granularity full --recompute-method uniform"
    if not (training.bf16 or training.fp16):
        yield "--bf16, where the device computes in it"
    if not (parallel.use_distributed_optimizer or parallel.use_torch_fsdp2):
        yield "several processes with --use-distributed-optimizer"
