"""The stages of a benchmark. Each runs in a process of its own and returns figures."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tandem.backends import create_engine, start_profiler, transformers_logits
from tandem.backends.interface import Engine, EngineSettings
from tandem.bench.options import BenchOptions
from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, MicroBatch, Sample, collate
from tandem.frameworks import TORCH
from tandem.models.config import ModelConfig
from tandem.models.flops import training_flops
from tandem.models.published import qwen3_config
from tandem.planning.hardware import HARDWARE, peak_flops
from tandem.planning.job import Job
from tandem.planning.memory import peak_memory
from tandem.planning.speed import kernels
from tandem.training.objectives import MeanLoss, RankBatch

Figures = dict[str, Any]
UNMEASURED_STEPS = 2  # in which kernels are compiled, and memory is allocated
TOY_LENGTHS = ((7, 1, 19, 12, 12, 5), (64,))
SAME_IN_FP32 = 1e-4  # largest relative difference between devices


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its name, what it shows, and what it runs."""

    name: str
    shows: str
    run: Callable[[BenchOptions], Figures]


def toy_config() -> ModelConfig:
    return dataclasses.replace(
        qwen3_config("0.6B"),
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        vocab_size=1000,
    )


def batch_of(config: ModelConfig, lengths: tuple[int, ...], samples: int = 1, seed: int = 0) -> MicroBatch:
    """Random tokens, of which all but the last of each sample are trained."""
    random = np.random.default_rng(seed)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    made = []
    for _ in range(samples):
        tokens = random.integers(0, config.vocab_size, len(positions), dtype=np.int32)
        labels = np.append(tokens[1:], np.int32(IGNORE)).astype(np.int32)
        made.append(Sample(tokens, labels, positions, lengths))
    return collate(made)


def weights_of(batches: list[MicroBatch]) -> list[np.ndarray]:
    trained = sum(batch.trained_tokens for batch in batches)
    return MeanLoss()(None, RankBatch(batches, trained)).weights


def engine_of(options: BenchOptions, config: ModelConfig, *, device: str | None, bf16: bool) -> Engine:
    engine = create_engine(options.ai_framework, config, EngineSettings(device=device, bf16=bf16))
    engine.load_weights(RandomSource(config, seed=0))
    return engine


def difference(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference of a gradient, relative to the largest number in it."""
    return max(
        float(np.abs(actual[name] - expected[name]).max() / (np.abs(expected[name]).max() + 1e-12)) for name in expected
    )


def parity(options: BenchOptions) -> Figures:
    config = toy_config()
    batches = [batch_of(config, lengths, seed=seed) for seed, lengths in enumerate(TOY_LENGTHS)]
    weights = weights_of(batches)
    expected_loss, expected = engine_of(options, config, device="cpu", bf16=False).loss_and_gradients(batches, weights)
    figures: Figures = {"device": engine_of(options, config, device=options.device, bf16=False).device_name}
    for name, bf16 in (("fp32", False), ("bf16", True)):
        engine = engine_of(options, config, device=options.device, bf16=bf16)
        loss, gradients = engine.loss_and_gradients(batches, weights)
        figures[f"{name} loss difference"] = abs(loss - expected_loss) / expected_loss
        figures[f"{name} gradient difference"] = difference(gradients, expected)
    figures["the same in fp32"] = (
        max(figures["fp32 loss difference"], figures["fp32 gradient difference"]) < SAME_IN_FP32
    )
    return figures


def against_transformers(options: BenchOptions) -> Figures:
    config = toy_config()
    batch = batch_of(config, TOY_LENGTHS[0])
    source = RandomSource(config, seed=0)
    logits = engine_of(options, config, device=options.device, bf16=False).logits(batch)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        copy(source, HFSink(target, config, "float32", Companions()))
        expected = transformers_logits(target, "float32", batch)
    largest = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return {"logits difference": largest, "the same in fp32": largest < SAME_IN_FP32}


def clipping_and_skipping(options: BenchOptions) -> Figures:
    """Whether an update is clipped, and a step that cannot be trusted changes nothing."""
    config = toy_config()
    batches = [batch_of(config, TOY_LENGTHS[0])]
    weights = weights_of(batches)

    def moments(device: str | None) -> tuple[dict[str, np.ndarray], bool]:
        settings = EngineSettings(device=device, clip_grad=0.01)
        engine = create_engine(options.ai_framework, config, settings)
        engine.load_weights(RandomSource(config, seed=0))
        skipped = engine.train_step(batches, weights, 1e-3, 0.1, loss_limit=1e-9).applied
        engine.train_step(batches, weights, 1e-3, 0.1)
        kept = {shard.spec.name: array.copy() for kind, shard, array in engine.tensors() if kind == "exp_avg"}
        return kept, not skipped

    (actual, skips), (expected, _) = moments(options.device), moments("cpu")
    largest = difference(actual, expected)
    return {"moment difference": largest, "clips as the CPU": largest < 10 * SAME_IN_FP32, "skips": skips}


def speed(options: BenchOptions, size: str, micro_batch_size: int) -> Figures:
    lengths = (options.seq_length,)
    return _measured(options, size, micro_batch_size, [lengths] * (UNMEASURED_STEPS + options.steps))


def packed(options: BenchOptions, size: str) -> Figures:
    """Documents of new lengths in every step."""
    random = np.random.default_rng(0)

    def lengths() -> tuple[int, ...]:
        cuts = np.sort(random.choice(options.seq_length - 1, options.documents - 1, replace=False)) + 1
        return tuple(np.diff([0, *cuts, options.seq_length]).tolist())

    return _measured(options, size, 1, [lengths() for _ in range(UNMEASURED_STEPS + options.steps)])


def _measured(options: BenchOptions, size: str, samples: int, steps: list[tuple[int, ...]]) -> Figures:
    config = _config(options, size)
    engine = engine_of(options, config, device=options.device, bf16=options.bf16)
    batches = [[batch_of(config, lengths, samples, seed)] for seed, lengths in enumerate(steps)]
    seconds, losses = [], []
    for of_step in batches:
        start = time.perf_counter()
        losses.append(engine.train_step(of_step, weights_of(of_step), 1e-5, 0.1).loss)
        seconds.append(time.perf_counter() - start)
    measured = seconds[UNMEASURED_STEPS:]
    flops = float(np.mean([samples * training_flops(config, lengths) for lengths in steps]))
    peak = peak_flops(engine.device_name, engine.param_dtype)
    median = float(np.median(measured))
    return {
        "device": engine.device_name,
        "dtype": engine.param_dtype,
        "layers": config.num_layers,
        "seconds": median,
        "slowest second": max(measured),
        "tokens/s": samples * options.seq_length / median,
        "MFU": None if peak is None else flops / median / peak,
        "memory": engine.peak_memory(),
        "planned memory": _planned(options, config, samples, engine),
        "losses": losses,
        "notices": engine.notices,
    }


def _planned(options: BenchOptions, config: ModelConfig, samples: int, engine: Engine) -> float:
    job = Job(
        config=config,
        micro_batch_size=samples,
        global_batch_size=samples,
        seq_length=options.seq_length,
        half=engine.param_dtype != "float32",
        ai_framework=options.ai_framework,
    )
    # What a plan says of memory is the same for every accelerator.
    return peak_memory(job, HARDWARE["cpu" if engine.device_name == "cpu" else "h100"])


def profiled(options: BenchOptions, size: str) -> Figures:
    """What one step launches, how often the host waits, and where the time goes."""
    config = _config(options, size)
    engine = engine_of(options, config, device=options.device, bf16=options.bf16)
    batches = [batch_of(config, (options.seq_length,))]
    for _ in range(UNMEASURED_STEPS):
        engine.train_step(batches, weights_of(batches), 1e-5, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        profiler = start_profiler(options.ai_framework, Path(folder))
        engine.train_step(batches, weights_of(batches), 1e-5, 0.1)
        seconds, _ = profiler.stop()
        counts = profiler.counts()
    ordered = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return {**counts, "planned kernels": _planned_kernels(options, config), "seconds by module": ordered}


def _planned_kernels(options: BenchOptions, config: ModelConfig) -> int:
    """What a plan expects an NVIDIA device to launch, or, with MindSpore, an Ascend."""
    job = Job(config=config, seq_length=options.seq_length, half=True, ai_framework=options.ai_framework)
    return sum(kernels(job, HARDWARE["h100" if job.framework is TORCH else "910b"]))


def _config(options: BenchOptions, size: str) -> ModelConfig:
    config = qwen3_config(size)
    return config if options.num_layers is None else dataclasses.replace(config, num_layers=options.num_layers)


def stages(options: BenchOptions) -> list[Stage]:
    """The stages of a benchmark, in order."""
    made = [
        Stage("parity", "toys on the device against the CPU", parity),
        Stage("clipping", "clipping, and steps that are skipped", clipping_and_skipping),
        Stage("transformers", "a toy on the device against transformers", against_transformers),
    ]
    for size in options.sizes:
        for samples in options.micro_batch_sizes:
            made.append(
                _of_size(f"{size}, micro-batch {samples}", "speed and memory of pretraining", speed, size, samples)
            )
        made.append(
            _of_size(f"{size}, packed", f"{options.documents} documents in a row, of new lengths", packed, size)
        )
        made.append(_of_size(f"{size}, profile", "kernels, waits, and where the time goes", profiled, size))
    return made


def _of_size(name: str, shows: str, function: Callable[..., Figures], *arguments: Any) -> Stage:
    return Stage(name, shows, lambda options: function(options, *arguments))
