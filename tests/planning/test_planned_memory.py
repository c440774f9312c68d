"""What the plan counts is what the layout gives, and what a train step really holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from frameworks import require_framework
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.views import Adapted
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import Sample, collate
from tandem.models.lora import Lora
from tandem.models.published import qwen3_config
from tandem.models.tensors import parameter_count
from tandem.moments import MomentSettings
from tandem.parallel.layout import Layout
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import Gathered, layer_activations, stage_memories
from toys import TOYS, toy_config

CPU = HARDWARE["cpu"]


@pytest.mark.parametrize("name", TOYS)
def test_stages_hold_the_whole_model(name: str) -> None:
    config = dataclasses.replace(TOYS[name], num_layers=4)
    job = Job(config=config, layout=Layout(pipeline_model_parallel_size=2))
    copy = config.vocab_size * config.hidden_size if config.tied else 0
    assert sum(memory.parameters for memory in stage_memories(job, CPU)) == parameter_count(config) + copy


def test_state_of_a_published_model() -> None:
    """18 bytes per parameter in bf16, where data ranks share the 12 of masters and moments (Megatron-LM's rule)."""
    config = qwen3_config("8B")
    alone = Job(config=config, half=True)
    (memory,) = stage_memories(alone, CPU)
    assert memory.parameters == parameter_count(config) == 8_190_735_360
    assert memory.weights + memory.gradients + memory.optimizer == 18 * memory.parameters
    narrow = dataclasses.replace(alone, moments=MomentSettings(exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"))
    assert stage_memories(narrow, CPU)[0] == dataclasses.replace(memory, optimizer=8 * memory.parameters)
    shared = dataclasses.replace(alone, data_parallel_size=8, global_batch_size=8, use_distributed_optimizer=True)
    (shared_memory,) = stage_memories(shared, CPU)
    assert shared_memory.optimizer == pytest.approx(memory.optimizer / 8, rel=1e-6)
    assert (shared_memory.weights, shared_memory.gradients) == (memory.weights, memory.gradients)


def test_state_of_fully_sharded_weights() -> None:
    """A rank has its rows of fp32 weights, gradients and two moments; whole weights are bf16, their gradients fp32."""
    config = qwen3_config("8B")
    job = Job(config=config, half=True, data_parallel_size=8, global_batch_size=8, use_torch_fsdp2=True)
    (memory,) = stage_memories(job, CPU)
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(16 * memory.parameters / 8, rel=1e-6)
    outside = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    layer = (memory.parameters - outside) / config.num_layers
    assert memory.gathered == Gathered(
        loss=6 * outside,
        # two layers' weights, a layer's gradients, and a copy of another's in place of its activations
        backward=6 * outside + 8 * layer + max(0, 4 * layer - layer_activations(job)),
        scatter=8 * outside,
    )
    assert memory.peak == memory.gathered_at_peak + dataclasses.replace(memory, gathered=Gathered()).peak
    alone = dataclasses.replace(job, data_parallel_size=1)
    assert stage_memories(alone, CPU) == stage_memories(dataclasses.replace(alone, use_torch_fsdp2=False), CPU)


def test_activations_of_a_layer_by_hand() -> None:
    config = toy_config()
    job = Job(config=config, seq_length=10, layout=Layout(tensor_model_parallel_size=2), half=True)
    halves = 2 * (6 + 2 + 2 + 6) * 16 // 2 + 2 * 2 * 80 // 2  # query, key, value and output heads; gate and up
    scales = 4 * (6 / 2 + 2)
    assert layer_activations(job) == 10 * (2 * 2 * 48 + halves + scales)
    split = dataclasses.replace(job, sequence_parallel=True)
    assert layer_activations(split) == 10 * (2 * 2 * 48 / 2 + halves + 4 * (6 / 2 + 2 / 2))


@pytest.mark.parametrize(
    ("chunks", "micro_batches", "layers_kept"),
    [
        (1, 8, [4 * 8, 3 * 8, 2 * 8, 1 * 8]),  # 1F1B
        (1, 2, [2 * 8, 2 * 8, 2 * 8, 1 * 8]),  # fewer micro-batches than stages
        (2, 8, [11 * 4, 9 * 4, 7 * 4, 5 * 4]),  # warm-up chunks 2 (p - 1 - s) + (v - 1) p, and one
    ],
)
def test_micro_batches_in_flight(chunks: int, micro_batches: int, layers_kept: list[int]) -> None:
    config = toy_config(num_layers=32, untie_embeddings_and_output_weights=True)
    layout = Layout(
        pipeline_model_parallel_size=4,
        num_layers_per_virtual_pipeline_stage=8 // chunks if chunks > 1 else None,
    )
    job = Job(config=config, layout=layout, global_batch_size=micro_batches, seq_length=32)
    residual = 32 * config.hidden_size * 4
    for memory, kept in zip(stage_memories(job, CPU)[:-1], layers_kept):
        assert memory.activations == pytest.approx(kept * layer_activations(job) + kept / 8 * residual)


def test_recomputed_layers_keep_their_input() -> None:
    config = toy_config(num_layers=4)
    job = Job(config=config, seq_length=100, recompute_layers=3)
    (memory,) = stage_memories(job, CPU)
    residual = 100 * config.hidden_size * 4
    assert memory.activations == 3 * residual + layer_activations(job) + residual + 2 * residual


@pytest.mark.parametrize(
    ("seq_length", "recompute_layers", "lora", "stage"),
    [
        *((seq_length, recompute_layers, None, None) for seq_length in (256, 512) for recompute_layers in (0, 4)),
        *((256, recompute_layers, Lora(r=16), None) for recompute_layers in (0, 4)),
        (256, 0, Lora(r=16, use_dora=True), None),
        (256, 0, None, "dpo"),
    ],
)
def test_a_train_step_allocates_what_is_planned(
    seq_length: int, recompute_layers: int, lora: Lora | None, stage: str | None, tmp_path: Path
) -> None:
    """Beyond weights, gradients and moments, the most that is alive at once, as PyTorch's profiler counts it."""
    require_framework("torch")
    from torch.profiler import ProfilerActivity, profile

    config = toy_config(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=768,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=32,
        vocab_size=1024,
    )
    source = RandomSource(config, 0)
    if lora is not None:
        config = dataclasses.replace(config, lora=lora)
        source = Adapted(FreshAdapters(source, config, 0), source, source)
    engine = create_engine("torch", config, EngineSettings(device="cpu", recompute_layers=recompute_layers))
    engine.load_weights(source)
    tokens = np.arange(seq_length, dtype=np.int32)
    job = Job(config=config, seq_length=seq_length, recompute_layers=recompute_layers, stage=stage)
    batch = [collate([Sample(tokens, tokens, tokens, (seq_length,))] * job.documents)]
    weights = [np.full(job.tokens, 1 / job.tokens)]
    engine.train_step(batch, weights, 1e-4, 0.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.train_step(batch, weights, 1e-4, 0.0)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    alive = np.cumsum([change for _, change in changes]).max()
    (memory,) = stage_memories(job, CPU)
    assert memory.activations + max(memory.logits, memory.workspace) == pytest.approx(alive, rel=0.15)
