"""Whether a device, and a layout, compute what one process on a CPU computes: stages on toys."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tandem.backends import transformers_logits
from tandem.backends.interface import Engine, StepResult
from tandem.bench.batches import batch_of, weights_of
from tandem.bench.layouts import Spread
from tandem.bench.options import BenchOptions
from tandem.bench.team import ALONE, Team
from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import MicroBatch
from tandem.frameworks import FIRST_TRANSFORMERS, has_transformers
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts
from tandem.models.published import qwen3_config
from tandem.parallel.grid import held_shards
from tandem.parallel.slices import cut

Figures = dict[str, Any]
TOY_LENGTHS = ((7, 1, 19, 12, 12, 5), (64,))
SAME_IN_FP32 = 1e-4  # largest relative difference between devices, and between layouts
STEPS_OF_LAYOUT = 3


def toy_config(spread: Spread = ALONE.spread) -> ModelConfig:
    """A small model that can be laid out so."""
    tensor, experts = spread.size("tp"), spread.size("ep")
    groups = max(2, tensor)
    return dataclasses.replace(
        qwen3_config("0.6B"),
        num_layers=2 * spread.size("pp"),
        hidden_size=128,
        ffn_hidden_size=256 * tensor,
        num_attention_heads=2 * groups,
        num_query_groups=groups,
        kv_channels=64,
        vocab_size=1000,
        model_type="qwen3" if experts == 1 else "qwen3_moe",
        experts=None if experts == 1 else _experts(2 * experts, 32 * tensor),
    )


def _experts(count: int, width: int) -> Experts:
    return Experts(num_experts=count, moe_router_topk=2, moe_ffn_hidden_size=width, norm_topk_prob=True)


def difference(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference of a gradient, relative to the largest number in it."""
    return max(
        float(np.abs(actual[name] - expected[name]).max() / (np.abs(expected[name]).max() + 1e-12)) for name in expected
    )


def parity(options: BenchOptions, team: Team) -> Figures:
    config = toy_config()
    batches = [batch_of(config, lengths, seed=seed) for seed, lengths in enumerate(TOY_LENGTHS)]
    weights = weights_of(batches)
    expected_loss, expected = team.engine(options, config, device="cpu", bf16=False).loss_and_gradients(
        batches, weights
    )
    figures: Figures = {"device": team.engine(options, config, device=options.device, bf16=False).device_name}
    for name, bf16 in (("fp32", False), ("bf16", True)):
        engine = team.engine(options, config, device=options.device, bf16=bf16)
        loss, gradients = engine.loss_and_gradients(batches, weights)
        figures[f"{name} loss difference"] = abs(loss - expected_loss) / expected_loss
        figures[f"{name} gradient difference"] = difference(gradients, expected)
    figures["the same in fp32"] = (
        max(figures["fp32 loss difference"], figures["fp32 gradient difference"]) < SAME_IN_FP32
    )
    return figures


def against_transformers(options: BenchOptions, team: Team) -> Figures:
    if not has_transformers():
        version = ".".join(map(str, FIRST_TRANSFORMERS))
        return {"left out": f"it needs transformers, from version {version} on, and PyTorch"}
    config = toy_config()
    batch = batch_of(config, TOY_LENGTHS[0])
    source = RandomSource(config, seed=0)
    logits = team.engine(options, config, device=options.device, bf16=False).logits(batch)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        copy(source, HFSink(target, config, "float32", Companions()))
        expected = transformers_logits(target, "float32", batch)
    largest = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return {"logits difference": largest, "the same in fp32": largest < SAME_IN_FP32}


def clipping_and_skipping(options: BenchOptions, team: Team) -> Figures:
    """Whether an update is clipped, and a step that cannot be trusted changes nothing."""
    config = toy_config()
    batches = [batch_of(config, TOY_LENGTHS[0])]
    weights = weights_of(batches)

    def moments(device: str | None) -> tuple[dict[str, np.ndarray], bool]:
        engine = team.engine(options, config, device=device, bf16=False, clip_grad=0.01)
        skipped = engine.train_step(batches, weights, 1e-3, 0.1, loss_limit=1e-9).applied
        engine.train_step(batches, weights, 1e-3, 0.1)
        kept = {shard.spec.name: array.copy() for kind, shard, array in engine.tensors() if kind == "exp_avg"}
        return kept, not skipped

    (actual, skips), (expected, _) = moments(options.device), moments("cpu")
    largest = difference(actual, expected)
    return {"moment difference": largest, "clips as the CPU": largest < 10 * SAME_IN_FP32, "skips": skips}


def layout_parity(options: BenchOptions, team: Team) -> Figures:
    """Whether processes together compute, in fp32, what one of their devices computes alone: gradients, then steps."""
    config, spread = toy_config(team.spread), team.spread
    count = spread.size("dp") * spread.micro_batches
    batches = [batch_of(config, TOY_LENGTHS[number % 2], seed=number) for number in range(count)]
    weights = weights_of(batches)
    expected_loss, expected, alone = _trained(
        ALONE.engine(options, config, device=options.device, bf16=False), batches, weights
    )
    place = team.place(config)
    share = slice(place.data, None, spread.size("dp"))
    engine = team.engine(options, config, device=options.device, bf16=False)
    loss, gradients, together = _trained(engine, batches[share], weights[share])
    own = {
        shard.spec.name: cut(expected[shard.spec.name], shard.part)
        for shard in held_shards(config, team.grid(config), place)
    }
    scales = {name: float(np.abs(expected[name]).max()) + 1e-12 for name in own}
    worst = max(float(np.abs(gradients[name] - own[name]).max()) / scales[name] for name in own)
    of_steps = max(
        max(abs(mine.loss - theirs.loss) / theirs.loss, abs(mine.grad_norm - theirs.grad_norm) / theirs.grad_norm)
        for mine, theirs in zip(together, alone, strict=True)
    )
    differences = {
        "fp32 loss difference": team.largest(abs(loss - expected_loss) / expected_loss),
        "fp32 gradient difference": team.largest(worst),
        "loss and norm difference of steps": team.largest(of_steps),
    }
    of_run = {"device": engine.device_name, "layout": spread.name, "processes": spread.processes}
    return {**of_run, **differences, "the same in fp32": max(differences.values()) < SAME_IN_FP32}


def _trained(
    engine: Engine, batches: list[MicroBatch], weights: list[np.ndarray]
) -> tuple[float, dict[str, np.ndarray], list[StepResult]]:
    """The loss and the gradients, and then what steps on the same batches give."""
    loss, gradients = engine.loss_and_gradients(batches, weights)
    kept = {name: gradient.copy() for name, gradient in gradients.items()}
    return loss, kept, [engine.train_step(batches, weights, 1e-3, 0.1) for _ in range(STEPS_OF_LAYOUT)]
