"""What the stages of `device.py` measure with: the sides that train, clocks, memory, and steps in turns."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.bench.batches import RepeatingSource, batch_of, weights_of
from tandem.bench.options import BenchOptions
from tandem.data.batch import IGNORE, MicroBatch
from tandem.models.config import ModelConfig
from tandem.models.published import qwen3_config
from tandem.planning.hardware import peak_flops

LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS = 1e-5, 0.1, 1.0, (0.9, 0.95)
UNMEASURED = 2  # steps of each side, in which kernels are compiled
STEPS = 5
GIB = 2**30
BF16_MOMENTS = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@dataclass
class Run:
    """Where stages run, of what size, and where results go."""

    device: str
    folder: Path
    tiny: bool
    note: Callable[[dict[str, Any]], None]

    @property
    def seq_length(self) -> int:
        return 64 if self.tiny else 4096

    @property
    def documents(self) -> int:
        return 8 if self.tiny else 200

    def config(self, size: str, num_layers: int | None = None) -> ModelConfig:
        config = qwen3_config(size)
        config = dataclasses.replace(config, num_layers=num_layers or config.num_layers)
        if not self.tiny:
            return config
        small = {"hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16, "vocab_size": 512, "num_layers": 2}
        return dataclasses.replace(config, **small, num_attention_heads=8, num_query_groups=4)

    @property
    def options(self) -> BenchOptions:
        return BenchOptions(ai_framework="torch", device=self.device)


class Ours:
    """Tandem's engine, and the steps that it trains."""

    def __init__(self, run: Run, config: ModelConfig, *, bf16: bool = True, **settings: Any) -> None:
        from tandem.backends import create_engine
        from tandem.backends.interface import EngineSettings

        self.config = config
        common = {"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "clip_grad": CLIP_GRAD, "device": run.device}
        self.engine = create_engine("torch", config, EngineSettings(**common, bf16=bf16, **settings))  # type: ignore[arg-type]
        self.engine.load_weights(RepeatingSource(config, 0))
        self._seed = 0

    def step(self, batch: MicroBatch) -> float:
        return self.engine.train_step([batch], weights_of([batch]), LEARNING_RATE, WEIGHT_DECAY).loss

    def new_batch(self, lengths: tuple[int, ...], samples: int = 1) -> MicroBatch:
        self._seed += 1
        return apart(batch_of(self.config, lengths, samples, self._seed))


def apart(batch: MicroBatch) -> MicroBatch:
    """The batch, in which no document's end predicts the next one's beginning."""
    labels = batch.labels.copy()
    labels[batch.cu_seqlens[1:] - 1] = IGNORE
    return dataclasses.replace(batch, labels=labels)


def peer_of(run: Run, config: ModelConfig, *, bf16: bool = True) -> Any:
    """transformers, trained as its Trainer does with `bf16=True`."""
    from peer import HuggingFaceTrainer

    source = RepeatingSource(config, 0)
    return HuggingFaceTrainer(source, LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS, device=run.device, bf16=bf16)


def padded_arrays(batch: MicroBatch, *, by_document: bool) -> dict[str, np.ndarray]:
    """A batch as transformers takes it: a row for each document, padded on the right to the longest."""
    lengths = batch.lengths.tolist()
    longest = max(lengths)
    ids = np.zeros((len(lengths), longest), np.int64)
    labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
    for row, (start, length) in enumerate(zip(batch.cu_seqlens[:-1].tolist(), lengths)):
        ids[row, :length] = batch.tokens[start : start + length]
        # transformers shifts labels itself
        labels[row, 1:length] = batch.labels[start : start + length - 1]
        mask[row, :length] = 1
    arrays = {"input_ids": ids, "labels": labels}
    return {**arrays, "attention_mask": mask} if by_document else arrays


def synchronise(device: str) -> None:
    import torch

    if device != "cpu":
        getattr(torch, device).synchronize()


def reset_peak(device: str) -> None:
    import torch
    import turns

    if device != "cpu":
        getattr(torch, device).reset_peak_memory_stats()
    else:
        turns.reset_peak()


def peak(device: str) -> float:
    """GiB since `reset_peak`; on a CPU, of the process."""
    import torch
    import turns

    return (turns.peak() if device == "cpu" else getattr(torch, device).max_memory_allocated()) / GIB


def held(device: str) -> float:
    """GiB that are in use now."""
    import torch
    import turns

    return (turns.resident() if device == "cpu" else getattr(torch, device).memory_allocated()) / GIB


def free(device: str) -> None:
    """Give unused memory back. The caller has dropped what held it."""
    import torch

    gc.collect()
    if device != "cpu":
        getattr(torch, device).empty_cache()


def timed(run: Run, act: Callable[[], Any]) -> tuple[float, Any]:
    synchronise(run.device)
    start = time.perf_counter()
    result = act()
    synchronise(run.device)
    return time.perf_counter() - start, result


@dataclass
class Side:
    """One side of a comparison: what it trains on in a step, and how it is told. A side that fails is noted once."""

    name: str
    step: Callable[[int], float]
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    peak: float = 0.0  # GiB, of all that is on the device
    added: float = 0.0  # GiB above what was there before the step
    failed: str = ""

    def turn(self, run: Run, number: int) -> None:
        if self.failed:
            return
        reset_peak(run.device)
        before = held(run.device)
        try:
            seconds, loss = timed(run, lambda: self.step(number))
        except Exception as error:  # noqa: BLE001 - out of memory, or a compiler's: the other sides go on
            self.failed = f"{type(error).__name__}: {str(error)[:300]}"
            free(run.device)
            return
        self.losses.append(float(loss))
        if number >= UNMEASURED:
            self.seconds.append(seconds)
            self.peak = max(self.peak, peak(run.device))
            self.added = max(self.added, peak(run.device) - before)


def in_turns(run: Run, sides: list[Side], steps: int = STEPS) -> None:
    """Steps of each side, one after the other, so that what disturbs one disturbs all."""
    for number in range(UNMEASURED + steps):
        for side in sides:
            side.turn(run, number)


def figures(side: Side, tokens: int, flops: float, name: str) -> dict[str, Any]:
    if not side.seconds:
        return {"side": side.name, "failed": side.failed or "no step was measured"}
    seconds = statistics.median(side.seconds)
    of_device = peak_flops(name, "bfloat16")
    return {
        "side": side.name,
        "tokens/s": tokens / seconds,
        "MFU": None if of_device is None else flops / seconds / of_device,
        "seconds": seconds,
        "slowest": max(side.seconds),
        "a step adds GiB": side.added,
        "peak GiB of all": side.peak,
        "losses": side.losses,
        **({"failed": side.failed} if side.failed else {}),
    }


def device_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else str(getattr(torch, device).get_device_name())
