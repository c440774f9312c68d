"""Adapters of both backends against PEFT: the same losses, norms and adapters, in and out of its folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import peft_model
import pytest
import torch
import transformers
from peft_model import peft  # skips this file where it is not installed
from safetensors.numpy import load_file

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.peft import PeftSource, write_peft
from tandem.checkpoints.adapters.views import Adapted, Merged
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_adapters, open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, MicroBatch, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.tensors import tensor_table
from tandem.training.objectives import MeanLoss, RankBatch
from toys import TOYS

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6},
        "alpha_pattern": {"o_proj": 3},
        "layers_to_transform": [0, 1],
    },
}


def write_model(folder: Path, config: ModelConfig, seed: int = 5) -> Path:
    copy(RandomSource(config, seed), HFSink(folder, config, "float32", Companions()))
    return folder


def batches(config: ModelConfig, steps: int, seed: int = 3) -> list[list[MicroBatch]]:
    """Each step's micro-batches: two, of two documents, with some labels masked."""
    random = np.random.default_rng(seed)

    def sample() -> Sample:
        length = int(random.integers(6, 14))
        tokens = random.integers(0, config.vocab_size, length + 1, dtype=np.int32)
        labels = tokens[1:].copy()
        labels[: int(random.integers(0, 4))] = IGNORE
        return Sample(tokens[:-1], labels, np.arange(length, dtype=np.int32), (length,))

    return [[collate([sample(), sample()]) for _ in range(2)] for _ in range(steps)]


def engine_of(framework: str, source: Adapted, **settings: Any) -> Any:
    engine = create_engine(
        framework, source.config, EngineSettings(adam_beta2=0.999, adam_eps=peft_model.EPSILON, **settings)
    )
    engine.load_weights(source)
    return engine


def train(engine: Any, steps: list[list[MicroBatch]], lr: float) -> list[tuple[float, float]]:
    results = []
    for micro_batches in steps:
        tokens = sum(batch.trained_tokens for batch in micro_batches)
        weights = MeanLoss()(None, RankBatch(micro_batches, tokens)).weights
        step = engine.train_step(micro_batches, weights, lr, peft_model.DECAY)
        results.append((step.loss, step.grad_norm))
    return results


def trained_adapters(engine: Any) -> dict[str, np.ndarray]:
    return {
        shard.spec.name: values.copy()
        for kind, shard, values in engine.tensors()
        if kind == "model" and shard.spec.adapter is not None
    }


@pytest.fixture(scope="module", params=["qwen3-tied", "qwen2", "llama"])
def toy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_peft(framework: str, kind: str, tmp_path: Path) -> None:
    config = TOYS["qwen2" if kind == "rslora" else "qwen3-tied"]
    model = peft_model.peft_model(write_model(tmp_path / "hf", config), **KINDS[kind])
    source = open_adapters(peft_model.saved(model, tmp_path / "start"), open_source(tmp_path / "hf"))
    engine, steps = engine_of(framework, source), batches(config, 20)

    expected = peft_model.train(model, steps, lr=3e-3)
    np.testing.assert_allclose(train(engine, steps, lr=3e-3), expected, atol=1e-5)

    end = PeftSource(peft_model.saved(model, tmp_path / "end"), config)
    for name, values in trained_adapters(engine).items():
        np.testing.assert_allclose(values, end.read(name), atol=1e-5, err_msg=name)


def test_all_gradients_equal_autograd(framework: str, tmp_path: Path, toy: str) -> None:
    config = TOYS[toy]
    model = peft_model.peft_model(write_model(tmp_path / "hf", config), use_dora=True)
    source = open_adapters(peft_model.saved(model, tmp_path / "adapter"), open_source(tmp_path / "hf"))
    (micro_batches,) = batches(config, 1)
    weights = [np.where(batch.labels == IGNORE, 0.0, 1.0) for batch in micro_batches]
    loss, gradients = engine_of(framework, source).loss_and_gradients(micro_batches, weights)

    expected = sum(peft_model.sum_of_losses(model, batch) for batch in micro_batches)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    saved = {
        name.replace(".default", ""): weight.grad.numpy()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    assert {source.adapters._stored[name].names[0] for name in gradients} == {
        name.removesuffix(".weight") if "magnitude" in name else name for name in saved
    }
    for name, gradient in gradients.items():
        peft_name = source.adapters._stored[name].names[0]
        reference = saved.get(peft_name, saved.get(f"{peft_name}.weight"))
        np.testing.assert_allclose(gradient, reference, atol=2e-5 * max(1, np.abs(reference).max()), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_comes_back_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    config = TOYS["qwen3-tied"]
    model = peft_model.peft_model(write_model(tmp_path / "hf", config), **KINDS[kind])
    before = peft_model.saved(model, tmp_path / "before")
    write_peft(tmp_path / "after", open_adapters(before, open_source(tmp_path / "hf")), str(tmp_path / "hf"))

    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (before, tmp_path / "after"))
    assert old.keys() == new.keys()
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "after")
    tokens = torch.arange(1, 12)[None]
    assert torch.equal(reloaded(tokens).logits, peft.PeftModel.from_pretrained(base, before)(tokens).logits)


def assert_logits_equal_peft(framework: str, source: Adapted, model: Any) -> None:
    """Merged as well as unmerged."""
    ((batch, _),) = batches(source.config, 1)
    unmerged = engine_of(framework, source, training=False).logits(batch)
    merged = Merged(source)
    plain = create_engine(framework, merged.config, EngineSettings(training=False))
    plain.load_weights(merged)
    np.testing.assert_allclose(plain.logits(batch), unmerged, atol=1e-5)
    with torch.no_grad():
        spans = zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:])
        documents = [torch.from_numpy(batch.tokens[start:stop].astype(np.int64)) for start, stop in spans]
        expected = torch.cat([model(tokens[None]).logits[0] for tokens in documents]).numpy()
    np.testing.assert_allclose(unmerged, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_peft(framework: str, kind: str, tmp_path: Path) -> None:
    config = TOYS["qwen3-tied"]
    model = peft_model.peft_model(write_model(tmp_path / "hf", config), **KINDS[kind])
    source = open_adapters(peft_model.saved(model, tmp_path / "adapter"), open_source(tmp_path / "hf"))
    assert_logits_equal_peft(framework, source, model)

    merged = model.merge_and_unload()
    for name in tensor_table(config):
        ours = Merged(source).read(name)
        for hf, part in _hf_parts(config, name, ours).items():
            np.testing.assert_allclose(part, merged.state_dict()[hf].numpy(), atol=1e-6, err_msg=hf)
        if "linear" not in name:
            assert ours.tobytes() == source.base.read(name).tobytes()


def _hf_parts(config: ModelConfig, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    from tandem.models.weight_map import WeightMap

    return WeightMap(config).to_hf(name, tensor)


def test_an_adapter_of_a_fused_weight_shares_one_a(framework: str, tmp_path: Path) -> None:
    """Names of Megatron's weights train one A for q, k and v, as three adapters that are kept equal would."""
    config = dataclasses.replace(
        TOYS["qwen3-tied"], lora=Lora(r=4, lora_alpha=8, target_modules=("linear_qkv", "linear_fc1", "linear_proj"))
    )
    base = open_source(write_model(tmp_path / "hf", config.without_adapters))
    engine = engine_of(framework, Adapted(FreshAdapters(base, config, 3), base, base))
    steps = batches(config, 4)
    train(engine, steps, lr=3e-3)

    class Trained(FreshAdapters):
        def read(self, name: str, kind: Any = "model") -> np.ndarray:
            return trained[name]

    trained = trained_adapters(engine)
    source = Adapted(Trained(base, config, 0), base, base)
    write_peft(tmp_path / "peft", source, str(tmp_path / "hf"))
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn."
    assert (tensors[f"{prefix}q_proj.lora_A.weight"] == tensors[f"{prefix}v_proj.lora_A.weight"]).all()
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32), tmp_path / "peft"
    )
    loss = sum(peft_model.sum_of_losses(model, b) for b in steps[0]).item()
    assert engine.evaluate(steps[0])[0] == pytest.approx(loss, rel=1e-5)


def test_without_adapters_the_weights_alone_compute(framework: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TOYS["qwen3-tied"], lora=Lora(r=3, lora_alpha=6, use_dora=True))
    base = open_source(write_model(tmp_path / "hf", config.without_adapters))
    engine = engine_of(framework, Adapted(FreshAdapters(base, config, 3), base, base))
    steps = batches(config, 3)
    before = engine.log_probabilities(steps[0])
    train(engine, steps, lr=3e-3)
    with engine.without_adapters():
        off = engine.log_probabilities(steps[0])
    plain = create_engine(framework, base.config, EngineSettings(training=False))
    plain.load_weights(base)
    for values, expected, start in zip(off, plain.log_probabilities(steps[0]), before, strict=True):
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_allclose(values, start, atol=1e-5, rtol=0)
    moved = np.abs(np.concatenate(engine.log_probabilities(steps[0])) - np.concatenate(off)).max()
    assert moved > 1e-2
