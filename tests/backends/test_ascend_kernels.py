"""MindSpore's kernels for Ascend, over a stand-in for MindSpore: what they compute, and how many operators they call.

No MindSpore is needed, except to compare the stand-in's operators with its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import fake_mindspore
import numpy as np
import pytest
from counted_steps import check, check_kinds
from toy_work import assert_close_gradients, mean_gradients, mean_step, toy_batch, toy_weights

from frameworks import require_framework
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.interface import TensorSource
from tandem.data.batch import IGNORE, MicroBatch, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.published import qwen3_config
from tandem.planning.counted import COUNTED
from tandem.training.objectives import MeanLoss, RankBatch
from toys import TOYS

RAGGED = (7, 1, 19, 12, 12, 5)
TOKENS = 4096
OURS, THEIRS = "tandem.backends.mindspore", "mindspore"


@contextmanager
def on_ascend() -> Iterator[fake_mindspore.Record]:
    """Inside, the MindSpore backend sees an Ascend device."""

    def of_both(name: str) -> bool:
        return any(name == package or name.startswith(f"{package}.") for package in (OURS, THEIRS))

    before: dict[str, ModuleType] = {name: sys.modules.pop(name) for name in list(sys.modules) if of_both(name)}
    sys.modules.update(fake_mindspore.modules())
    record = fake_mindspore.RECORD
    record.clear()
    record.memoryless = False
    yield record
    for name in [name for name in sys.modules if of_both(name)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def ascend() -> Iterator[fake_mindspore.Record]:
    with on_ascend() as record:
        yield record


def create(config: ModelConfig, **settings: Any) -> Any:
    engine = importlib.import_module(f"{OURS}.engine")
    return engine.create(config, EngineSettings(device="npu", **settings))


def build(source: TensorSource, **settings: Any) -> Any:
    engine = create(source.config, **settings)
    engine.load_weights(source)
    return engine


def on_pytorch(source: TensorSource, **settings: Any) -> Any:
    require_framework("torch")
    engine = create_engine("torch", source.config, EngineSettings(device="cpu", **settings))
    engine.load_weights(source)
    return engine


@pytest.mark.parametrize("toy", list(TOYS))
def test_they_give_pytorchs_gradients(toy: str, ascend: fake_mindspore.Record) -> None:
    source = toy_weights(TOYS[toy])
    batches = [toy_batch(source.config, RAGGED), toy_batch(source.config, (9, 4), seed=2)]
    expected_loss, expected = mean_gradients(on_pytorch(source), batches)
    loss, gradients = mean_gradients(build(source), batches)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-4)


@pytest.mark.parametrize(("toy", "dora"), [("qwen3-tied", False), ("qwen3-tied", True), ("qwen3-moe", False)])
def test_adapters_have_pytorchs_gradients(toy: str, dora: bool, ascend: fake_mindspore.Record) -> None:
    lora = Lora(r=3, lora_alpha=6, use_dora=dora)
    source = toy_weights(dataclasses.replace(TOYS[toy], lora=lora))
    batches = [toy_batch(source.config, RAGGED)]
    expected_loss, expected = mean_gradients(on_pytorch(source), batches)
    loss, gradients = mean_gradients(build(source), batches)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-4)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_experts_with_a_capacity_drop_pytorchs_choices(policy: str, ascend: fake_mindspore.Record) -> None:
    source = toy_weights(TOYS["qwen3-moe"])
    batches = [toy_batch(source.config, RAGGED)]
    settings = {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": policy, "moe_aux_loss_coeff": 0.1}
    one, other = on_pytorch(source, **settings), build(source, **settings)
    (expected_loss, expected), (loss, gradients) = (mean_gradients(engine, batches) for engine in (one, other))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-4)
    loads = [engine.expert_load() for engine in (one, other)]
    assert loads[0].dropped == loads[1].dropped > 0
    assert loads[0].counts == loads[1].counts


def test_they_update_as_pytorch(ascend: fake_mindspore.Record) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batches = [toy_batch(source.config, RAGGED)]
    expected, actual = on_pytorch(source, clip_grad=0.01), build(source, clip_grad=0.01)
    for engine in (expected, actual):
        assert not mean_step(engine, batches, 1e-3, 0.1, loss_limit=1e-9).applied
        assert mean_step(engine, batches, 1e-3, 0.1).grad_norm > 0.1  # so that it is clipped
        mean_step(engine, batches, 1e-3, 0.1)
    for (kind, shard, value), (_, _, wanted) in zip(actual.tensors(), expected.tensors(), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=2e-3, atol=1e-6, err_msg=f"{kind} {shard.spec.name}")


def test_losses_and_the_most_likely_tokens_are_pytorchs(ascend: fake_mindspore.Record) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, RAGGED)
    expected, actual = on_pytorch(source), build(source)
    np.testing.assert_allclose(
        actual.log_probabilities([batch])[0], expected.log_probabilities([batch])[0], rtol=1e-4, atol=1e-5
    )


def test_more_documents_than_one_call_takes(ascend: fake_mindspore.Record) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, (2,) * 1500)
    loss, gradients = mean_gradients(build(source), [batch])
    assert set(ascend.documents) == {1024, 476}
    expected_loss, expected = mean_gradients(on_pytorch(source), [batch])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-4)


# --- budgets


def shape(size: str, layers: int) -> ModelConfig:
    return dataclasses.replace(qwen3_config(size), num_layers=layers)


def batch_of(lengths: tuple[int, ...]) -> MicroBatch:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    labels = np.append(tokens[1:], IGNORE).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    return collate([Sample(tokens, labels, positions, lengths)])


def step(engine: Any, lengths: tuple[int, ...], micro_batches: int = 1) -> None:
    batches = [batch_of(lengths)] * micro_batches
    weights = MeanLoss()(None, RankBatch(batches, sum(batch.trained_tokens for batch in batches))).weights
    assert engine.train_step(batches, weights, lr=1e-4, weight_decay=0.1).applied


def count(
    record: fake_mindspore.Record,
    config: ModelConfig,
    lengths: tuple[int, ...] = (TOKENS,),
    micro_batches: int = 1,
    **settings: Any,
) -> Counter[str]:
    """Operators of a step after the first one, in which tables are made. Tensors have no memory."""
    record.memoryless = True
    engine = create(config, bf16=True, **settings)
    step(engine, lengths)
    record.clear()
    step(engine, lengths, micro_batches)
    return Counter(record.kernels)


def passes_alone(record: fake_mindspore.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out of the counts what a step does with a weight after the passes: norm, update, rounding."""
    engine = importlib.import_module(f"{OURS}.engine").MindSporeEngine
    monkeypatch.setattr(engine, "_sum_of_squares", lambda self, names: 1.0)
    monkeypatch.setattr(engine, "_update", lambda *_: None)


def test_a_layer_of_8b_calls_few_operators(ascend: fake_mindspore.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    passes_alone(ascend, monkeypatch)
    difference = count(ascend, shape("8B", 2))
    difference.subtract(count(ascend, shape("8B", 1)))
    weights = 4  # with a product for a gradient: linear_qkv, linear_proj, linear_fc1, linear_fc2
    assert sum(difference.values()) <= 60 + 2 * weights, difference
    assert difference["matmul"] == 3 * weights  # forward, and two backward: no pass runs twice
    assert difference["FlashAttentionScore"] == difference["FlashAttentionScoreGrad"] == 1


def test_an_update_calls_few_operators_for_a_weight(ascend: fake_mindspore.Record) -> None:
    difference = count(ascend, shape("8B", 2))
    difference.subtract(count(ascend, shape("8B", 1)))
    assert sum(difference.values()) <= 60 + 2 * 4 + 4 * 8, difference  # 8 weights: norm, update, rounding


def test_head_and_loss_call_few_operators(ascend: fake_mindspore.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: Counter[str] = Counter()
    sets = importlib.import_module(f"{OURS}.compute.sets")
    loss = sets.NPU.cross_entropy_and_gradient

    def noted(*arguments: Any) -> Any:
        before = Counter(ascend.kernels)
        result = loss(*arguments)
        inside.update(Counter(ascend.kernels) - before)
        return result

    counting = dataclasses.replace(sets.NPU, cross_entropy_and_gradient=noted)
    monkeypatch.setitem(sets._KERNELS, "npu", counting)
    ascend.memoryless = True
    step(create(shape("8B", 1), bf16=True), (TOKENS,))
    assert 0 < sum(inside.values()) <= 60, inside


def test_documents_in_a_row_add_nothing(ascend: fake_mindspore.Record) -> None:
    config = shape("0.6B", 2)
    lengths = (20,) * 199 + (TOKENS - 20 * 199,)
    assert count(ascend, config, lengths) == count(ascend, config)


def test_a_step_is_read_once_and_each_micro_batch_is_one_copy(ascend: fake_mindspore.Record) -> None:
    count(ascend, shape("0.6B", 2), micro_batches=3)
    assert ascend.reads == 1  # of loss, norm and tokens, when all passes are launched
    assert ascend.copies == 3


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_copy_nothing(dora: bool, ascend: fake_mindspore.Record) -> None:
    """Which rows an adapter adds to is on the device, from the first step on."""
    lora = Lora(r=4, use_dora=dora)
    count(ascend, dataclasses.replace(shape("0.6B", 2), lora=lora), micro_batches=3)
    assert (ascend.reads, ascend.copies) == (1, 3)


def test_a_process_asks_its_own_device_for_memory_and_not_before_it_computes(ascend: fake_mindspore.Record) -> None:
    engine = build(toy_weights(TOYS["qwen3-tied"]))
    ascend.clear()
    memory = fake_mindspore.MEMORY
    assert engine.free_memory() == memory["free"] + memory["reserved"] - memory["allocated"]


def sparse(layers: int, experts: int) -> ModelConfig:
    config = shape("30B-A3B", layers)
    assert config.experts is not None
    return dataclasses.replace(config, experts=dataclasses.replace(config.experts, num_experts=experts))


def test_a_layer_with_experts_calls_as_many_operators_for_128_as_for_16(ascend: fake_mindspore.Record) -> None:
    """A layer of 30B-A3B's widths, with all the losses that balance its router."""
    losses = {"moe_aux_loss_coeff": 1e-3, "moe_z_loss_coeff": 1e-3}
    one, few, both = (count(ascend, sparse(*size), **losses) for size in ((1, 128), (1, 16), (2, 128)))
    assert (ascend.reads, ascend.copies) == (1, 1)  # no layer asks how many rows an expert has
    assert one == few
    layer = both - one
    assert layer["gmm"] == 6  # of two weights: the product, its own gradient, its input's gradient
    assert sum(layer.values()) <= 150, layer


def test_a_step_of_0_6b_calls_few_operators(ascend: fake_mindspore.Record) -> None:
    operators = count(ascend, shape("0.6B", 28))
    assert sum(operators.values()) <= 28 * 100 + 60 + 60, (
        operators
    )  # layers with their updates, head and loss, the rest


@pytest.mark.parametrize("name", list(fake_mindspore.OPERATORS))
def test_the_stand_ins_operators_are_mindspores(name: str) -> None:
    require_framework("mindspore")
    real = getattr(importlib.import_module("mindspore").ops.auto_generate, name)
    fake = fake_mindspore.OPERATORS[name]
    for part in ("__init__", "__call__") if inspect.isclass(fake) else ("",):
        names = [list(inspect.signature(getattr(one, part) if part else one).parameters) for one in (fake, real)]
        if part != "__init__" or names[0] != ["self", "args", "kwargs"]:  # a class without arguments
            assert names[0] == names[1], part


@pytest.mark.parametrize("name", [*fake_mindspore.MINT, "nn.functional.log_softmax", "linalg.vector_norm"])
def test_the_stand_ins_functions_are_in_mint(name: str) -> None:
    require_framework("mindspore")
    found: Any = importlib.import_module("mindspore").mint
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
    names = [set(inspect.signature(one).parameters) for one in (fake_mindspore.MINT.get(name, found), found)]
    assert names[0] <= names[1] or "args" in names[1] or names[0] == {"x"}, names


def test_the_stand_ins_grouped_product_is_mindspores() -> None:
    require_framework("mindspore")
    real: Any = importlib.import_module("mindspore").ops.function.math_func.gmm
    fake = inspect.signature(fake_mindspore.gmm)
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in fake.parameters.values()]
    assert f"gmm{inspect.Signature(parameters)} ->" in real.__doc__


@pytest.mark.parametrize("size", ["0.6B", "8B"])
def test_a_plan_knows_the_counts(size: str, ascend: fake_mindspore.Record) -> None:
    def counts(size: str, layers: int, tokens: int, micro_batches: int, again: int) -> tuple[int, int]:
        kernels = count(ascend, shape(size, layers), (tokens,), micro_batches, recompute_layers=again)
        return sum(kernels.values()), ascend.moved

    check(COUNTED["mindspore", "ascend"], size, counts, "mindspore")


def test_a_plan_knows_the_counts_of_experts_and_adapters(ascend: fake_mindspore.Record) -> None:
    def kernels(config: ModelConfig, micro_batches: int) -> int:
        return sum(count(ascend, config, (TOKENS,), micro_batches).values())

    check_kinds(COUNTED["mindspore", "ascend"], kernels)
