"""How fast a size trains in a layout, what memory it takes, and what a step launches: stages with random weights."""

from __future__ import annotations

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from tandem.backends import start_profiler
from tandem.backends.interface import Engine
from tandem.bench.batches import RepeatingSource, batch_of, weights_of
from tandem.bench.options import BenchOptions
from tandem.bench.team import Team
from tandem.data.batch import MicroBatch
from tandem.frameworks import TORCH
from tandem.models.config import ModelConfig
from tandem.models.flops import training_flops
from tandem.planning.hardware import HARDWARE, peak_flops
from tandem.planning.job import Job
from tandem.planning.memory import peak_memory
from tandem.planning.speed import kernels

Figures = dict[str, Any]
UNMEASURED_STEPS = 2  # in which kernels are compiled, and memory is allocated
LR, WEIGHT_DECAY = 1e-5, 0.1


def speed(options: BenchOptions, team: Team, size: str, micro_batch_size: int) -> Figures:
    lengths = (options.seq_length,)
    return _measured(options, team, size, micro_batch_size, [lengths] * (UNMEASURED_STEPS + options.steps))


def packed(options: BenchOptions, team: Team, size: str) -> Figures:
    """Documents of new lengths in every step."""
    random = np.random.default_rng(0)
    steps = [random_lengths(random, options) for _ in range(UNMEASURED_STEPS + options.steps)]
    return _measured(options, team, size, 1, steps)


def random_lengths(random: np.random.Generator, options: BenchOptions) -> tuple[int, ...]:
    """The lengths of a packed sample's documents."""
    cuts = np.sort(random.choice(options.seq_length - 1, options.documents - 1, replace=False)) + 1
    return tuple(np.diff([0, *cuts, options.seq_length]).tolist())


def engine_of(options: BenchOptions, team: Team, config: ModelConfig) -> Engine:
    source = RepeatingSource(config, seed=0)
    return team.engine(options, config, device=options.device, bf16=options.bf16, source=source)


def _measured(options: BenchOptions, team: Team, size: str, samples: int, steps: list[tuple[int, ...]]) -> Figures:
    config, spread = options.config(size), team.spread
    engine = engine_of(options, team, config)
    batches = [_of_rank(team, config, lengths, samples, seed) for seed, lengths in enumerate(steps)]
    seconds, losses = [], []
    for of_step in batches:
        weights = weights_of(of_step, spread.size("dp"))
        start = time.perf_counter()
        losses.append(engine.train_step(of_step, weights, LR, WEIGHT_DECAY).loss)
        seconds.append(time.perf_counter() - start)
    measured = seconds[UNMEASURED_STEPS:]
    samples_of_step = samples * spread.size("dp") * spread.micro_batches
    flops = float(np.mean([samples_of_step * training_flops(config, lengths) for lengths in steps]))
    peak = peak_flops(engine.device_name, engine.param_dtype)
    median = float(np.median(measured))
    rate = samples_of_step * options.seq_length / median
    return {
        "device": engine.device_name,
        "dtype": engine.param_dtype,
        "layout": spread.name,
        "processes": spread.processes,
        "micro-batches of a rank": spread.micro_batches,
        "layers": config.num_layers,
        "seconds": median,
        "slowest second": max(measured),
        "tokens/s": rate,
        "tokens/s of a process": rate / spread.processes,
        "MFU": None if peak is None else flops / median / peak / spread.processes,
        "memory": team.largest(engine.peak_memory()),
        "planned memory": _planned(options, team, config, samples, engine),
        "losses": losses,
        "notices": engine.notices,
    }


def _of_rank(team: Team, config: ModelConfig, lengths: tuple[int, ...], samples: int, step: int) -> list[MicroBatch]:
    """This data rank's micro-batches of a step."""
    ranks, count = team.spread.size("dp"), team.spread.micro_batches
    first = (step * ranks + team.place(config).data) * count
    return [batch_of(config, lengths, samples, first + number) for number in range(count)]


def _planned(options: BenchOptions, team: Team, config: ModelConfig, samples: int, engine: Engine) -> float:
    # What a plan says of memory is the same for every accelerator.
    job = _job(options, team, config, samples, half=engine.param_dtype != "float32")
    return peak_memory(job, HARDWARE["cpu" if engine.device_name == "cpu" else "h100"])


def profiled(options: BenchOptions, team: Team, size: str) -> Figures:
    """What one step of the first rank launches, how often the host waits, and where the time goes."""
    config = options.config(size)
    engine = engine_of(options, team, config)
    batches = _of_rank(team, config, (options.seq_length,), 1, 0)
    weights = weights_of(batches, team.spread.size("dp"))
    for _ in range(UNMEASURED_STEPS):
        engine.train_step(batches, weights, LR, WEIGHT_DECAY)
    with _folder(team) as folder:
        profiler = start_profiler(options.ai_framework, Path(folder)) if folder else None
        engine.train_step(batches, weights, LR, WEIGHT_DECAY)
        if profiler is None:
            return {}
        seconds, _ = profiler.stop()
        counts = profiler.counts()
    ordered = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    of_run = {"layout": team.spread.name, "processes": team.spread.processes}
    planned = {"planned kernels": _planned_kernels(options, team, config, engine.device_name)}
    return {**of_run, **counts, **planned, "seconds by module": ordered}


def _folder(team: Team) -> AbstractContextManager[str | None]:
    """A folder for the profiler's files, on the first rank."""
    return tempfile.TemporaryDirectory() if team.rank == 0 else nullcontext()


def _planned_kernels(options: BenchOptions, team: Team, config: ModelConfig, device_name: str) -> int:
    """What a plan expects a device of this maker to launch: NVIDIA or Ascend. A CPU stands for what trains fastest."""
    job = _job(options, team, config, 1, half=True)
    is_ascend = device_name.startswith("Ascend") or (device_name == "cpu" and job.framework is not TORCH)
    return sum(kernels(job, HARDWARE["910b" if is_ascend else "h100"]))


def _job(options: BenchOptions, team: Team, config: ModelConfig, samples: int, *, half: bool) -> Job:
    return team.spread.job(
        config,
        micro_batch_size=samples,
        seq_length=options.seq_length,
        half=half,
        framework=options.ai_framework,
    )
