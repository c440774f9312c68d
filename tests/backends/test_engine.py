"""What every engine must do, whatever its framework: the same numbers as Hugging Face's model and torch's AdamW."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from reference import (
    MemorySource,
    Reference,
    assert_close_gradients,
    mean_gradients,
    mean_step,
    snapshot,
    toy_batch,
    toy_samples,
    toy_weights,
)

from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.interface import TensorSource
from tandem.data.batch import IGNORE, MicroBatch, collate
from tandem.models.config import RotaryScaling
from tandem.models.tensors import tensor_table
from toys import TOYS, toy_config

RAGGED = (7, 1, 19, 12, 12, 5)
FP16_ROUNDING = 2.0**-11  # the most that a number loses, relatively


def build(framework: str, source: TensorSource, **settings: object) -> Engine:
    engine = create_engine(framework, source.config, EngineSettings(device="cpu", **settings))  # type: ignore[arg-type]
    engine.load_weights(source)
    return engine


# --- the model


@pytest.mark.parametrize("toy", TOYS)
def test_logits_equal_hugging_face(framework: str, toy: str) -> None:
    source = toy_weights(TOYS[toy])
    batch = toy_batch(source.config, RAGGED)
    expected = Reference(source).logits(batch).detach().numpy()
    logits = build(framework, source, training=False).logits(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [RAGGED, (16, 16, 16), (40,)], ids=["ragged", "equal", "one"])
@pytest.mark.parametrize("toy", TOYS)
def test_loss_and_every_gradient_equal_hugging_face(framework: str, toy: str, lengths: tuple[int, ...]) -> None:
    source = toy_weights(TOYS[toy])
    batches = [toy_batch(source.config, lengths, seed=1, trained=0.7)]
    expected_loss, expected = Reference(source).loss_and_gradients(batches)
    loss, gradients = mean_gradients(build(framework, source), batches)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [RotaryScaling("linear", 4.0), RotaryScaling("llama3", 8.0, original_max_position_embeddings=64)],
    ids=lambda scaling: scaling.kind,
)
def test_rotary_scaling_equals_hugging_face(framework: str, scaling: RotaryScaling) -> None:
    config = dataclasses.replace(TOYS["llama"], rotary_scaling=scaling)
    source = toy_weights(config)
    batch = toy_batch(config, (150, 30))
    expected = Reference(source).logits(batch).detach().numpy()
    np.testing.assert_allclose(build(framework, source).logits(batch), expected, atol=1e-4, rtol=0)


def test_positions_are_those_of_the_batch(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, RAGGED)
    batch = dataclasses.replace(batch, position_ids=batch.position_ids * 3 + 5)
    expected = Reference(source).logits(batch).detach().numpy()
    np.testing.assert_allclose(build(framework, source).logits(batch), expected, atol=1e-4, rtol=0)


def test_packed_equals_unpacked(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    samples = toy_samples(source.config, RAGGED, trained=0.6)
    engine = build(framework, source)
    loss, gradients = mean_gradients(engine, [collate(samples)])
    alone = [mean_gradients(engine, [collate([sample])]) for sample in samples]
    shares = np.array([np.count_nonzero(sample.labels != IGNORE) for sample in samples], dtype=np.float64)
    shares /= shares.sum()
    assert loss == pytest.approx(sum(share * one for share, (one, _) in zip(shares, alone)), rel=1e-5)
    combined = {name: sum(share * one[name] for share, (_, one) in zip(shares, alone)) for name in gradients}
    assert_close_gradients(gradients, combined, rtol=1e-5)


def test_documents_do_not_see_each_other(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(framework, source, training=False)
    batch = toy_batch(source.config, RAGGED)
    third = slice(batch.cu_seqlens[2], batch.cu_seqlens[3])
    tokens = batch.tokens.copy()
    tokens[third] = (tokens[third] + 1) % source.config.vocab_size
    before, after = engine.logits(batch), engine.logits(dataclasses.replace(batch, tokens=tokens))
    others = np.ones(len(tokens), dtype=bool)
    others[third] = False
    np.testing.assert_allclose(after[others], before[others], atol=1e-6, rtol=0)
    assert np.abs(after[third] - before[third]).max() > 1e-2


def test_logits_of_some_rows(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(framework, source, training=False)
    batch = toy_batch(source.config, RAGGED)
    rows = np.array([3, 0, 41])
    np.testing.assert_allclose(engine.logits(batch, rows), engine.logits(batch)[rows], atol=1e-6, rtol=0)


# --- the optimizer


@pytest.mark.parametrize("clip_grad", [0.0, 0.5], ids=["no-clip", "clip"])
@pytest.mark.parametrize("toy", ["qwen3-tied", "qwen3-untied"])
def test_train_steps_equal_torch_adamw(framework: str, toy: str, clip_grad: float) -> None:
    source = toy_weights(TOYS[toy])
    reference = Reference(source)
    parameters = list(reference.model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    engine = build(framework, source, clip_grad=clip_grad, adam_beta2=0.95, adam_eps=1e-6)
    for step in range(6):
        batches = [toy_batch(source.config, RAGGED, seed=2 * step + i, trained=0.7) for i in range(2)]
        for group in adamw.param_groups:
            group["lr"] = 1e-3 / (step + 1)
        adamw.zero_grad()
        expected = reference.loss(batches)
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or float("inf"))
        adamw.step()
        result = mean_step(engine, batches, lr=1e-3 / (step + 1), weight_decay=0.1)
        assert result.applied
        assert result.trained_tokens == sum(batch.trained_tokens for batch in batches)
        assert result.loss == pytest.approx(expected.item(), abs=1e-4)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert engine.optimizer_step == 6
    weights = snapshot(engine)
    for name, expected_weight in reference.weights().items():
        np.testing.assert_allclose(weights.read(name), expected_weight, atol=2e-4, rtol=0, err_msg=name)


def test_one_dimensional_tensors_do_not_decay(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, RAGGED)
    decayed, plain = (build(framework, source) for _ in range(2))
    mean_step(decayed, [batch], lr=1e-2, weight_decay=0.5)
    mean_step(plain, [batch], lr=1e-2, weight_decay=0.0)
    after, without = snapshot(decayed), snapshot(plain)
    for name, spec in tensor_table(source.config).items():
        shrinkage = 0.0 if len(spec.shape) == 1 else 1e-2 * 0.5
        expected = without.read(name) - shrinkage * source.read(name)
        np.testing.assert_allclose(after.read(name), expected, atol=1e-6, rtol=0, err_msg=name)


def test_nothing_changes_when_gradients_are_not_finite(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    batch = toy_batch(source.config, RAGGED)
    engine = build(framework, source)
    mean_step(engine, [batch], lr=1e-3, weight_decay=0.1)
    broken = snapshot(engine)
    broken.read("decoder.final_layernorm.weight")[0] = np.inf
    engine.load_weights(broken)
    result = mean_step(engine, [batch], lr=1e-3, weight_decay=0.1)
    assert not result.applied
    assert engine.optimizer_step == 1
    after = snapshot(engine)
    for kind in broken.kinds():
        for name in tensor_table(source.config):
            np.testing.assert_array_equal(after.read(name, kind), broken.read(name, kind))
    engine.load_weights(source)
    assert mean_step(engine, [batch], lr=1e-3, weight_decay=0.1).applied


def test_a_loss_above_the_limit_changes_nothing(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, RAGGED)
    engine = build(framework, source)
    loss, _ = mean_gradients(engine, [batch])
    result = mean_step(engine, [batch], lr=1e-3, weight_decay=0.1, loss_limit=loss * 0.99)
    assert not result.applied
    assert result.loss == pytest.approx(loss)
    assert np.isfinite(result.grad_norm)
    after = snapshot(engine)
    assert all(np.array_equal(after.read(name), source.read(name)) for name in tensor_table(source.config))
    assert mean_step(engine, [batch], lr=1e-3, weight_decay=0.1, loss_limit=loss * 1.01).applied


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings"),
        ("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1"),
        ("decoder.layers.2.self_attention.linear_qkv.weight", "decoder.layers.2"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm"),
        (None, None),
    ],
)
def test_the_first_module_that_is_not_finite_is_named(framework: str, tensor: str | None, module: str | None) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    if tensor:
        source.read(tensor)[...] = np.inf
    name = build(framework, source).first_bad_output([toy_batch(source.config, RAGGED)])
    assert (name or "").startswith(module or "")
    assert (name is None) == (module is None)


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_save_and_restore_is_bitwise(framework: str, fp16: bool) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batches = [toy_batch(source.config, RAGGED, seed=step, trained=0.8) for step in range(5)]

    def train(engine: Engine, part: list[MicroBatch]) -> list[float]:
        scale = 1024.0 if fp16 else 1.0
        return [mean_step(engine, [batch], lr=1e-3, weight_decay=0.1, loss_scale=scale).loss for batch in part]

    straight = build(framework, source, fp16=fp16)
    expected = train(straight, batches)
    first = build(framework, source, fp16=fp16)
    losses = train(first, batches[:2])
    saved = snapshot(first)
    second = build(framework, saved, fp16=fp16)
    second.load_optimizer(saved, first.optimizer_step)
    losses += train(second, batches[2:])
    assert losses == expected
    assert second.optimizer_step == straight.optimizer_step == 5
    restored, uninterrupted = snapshot(second), snapshot(straight)
    weights = ("model", "master") if fp16 else ("model",)
    assert restored.kinds() == (*weights, "exp_avg", "exp_avg_sq")
    assert_same_bits(restored, uninterrupted)


def assert_same_bits(actual: MemorySource, expected: MemorySource) -> None:
    """Everything that a checkpoint holds is the same, dtypes too."""
    assert actual.kinds() == expected.kinds()
    for kind in expected.kinds():
        for name in tensor_table(expected.config):
            assert actual.dtype(name, kind) == expected.dtype(name, kind)
            np.testing.assert_array_equal(actual.read(name, kind), expected.read(name, kind), err_msg=f"{kind} {name}")


def test_tensors_follow_the_table(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    table = tensor_table(source.config)
    entries = [(kind, shard.spec.name, array.shape) for kind, shard, array in build(framework, source).tensors()]
    kinds = ("model", "exp_avg", "exp_avg_sq")
    assert entries == [(kind, name, spec.shape) for kind in kinds for name, spec in table.items()]
    inference = [(kind, shard.spec.name) for kind, shard, _ in build(framework, source, training=False).tensors()]
    assert inference == [("model", name) for name in table]


def test_gradients_and_evaluation_change_no_state(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, RAGGED)
    plain, watched = build(framework, source), build(framework, source)
    for _ in range(2):
        mean_gradients(watched, [toy_batch(source.config, (9, 9), seed=5)])
        watched.evaluate([batch])
        watched.logits(batch)
        step = (mean_step(plain, [batch], 1e-3, 0.1), mean_step(watched, [batch], 1e-3, 0.1))
        assert step[0] == step[1]


# --- memory and precision


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_recompute_is_bitwise_equal(framework: str, fp16: bool) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batches = [toy_batch(source.config, RAGGED, seed=seed, trained=0.8) for seed in range(2)]
    plain_loss, plain = mean_gradients(build(framework, source, fp16=fp16), batches)
    for layers in (1, source.config.num_layers):
        engine = build(framework, source, recompute_layers=layers, fp16=fp16)
        loss, gradients = mean_gradients(engine, batches)
        assert loss == plain_loss
        for name, gradient in plain.items():
            np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)


def test_bf16_is_used_or_refused_aloud(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(framework, source, bf16=True)
    if engine.param_dtype == "float32":
        assert len(engine.notices) == 1
        assert "bf16" in engine.notices[0]
    else:
        assert engine.param_dtype == "bfloat16"
        assert engine.notices == []
    kinds = {kind for kind, _, _ in engine.tensors()}
    assert ("master" in kinds) == (engine.param_dtype == "bfloat16")
    batch = toy_batch(source.config, RAGGED)
    actual = mean_step(engine, [batch], 1e-3, 0.1)
    expected = mean_step(build(framework, source), [batch], 1e-3, 0.1)
    assert actual.loss == pytest.approx(expected.loss, rel=2e-2)
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=5e-2)


def test_fp16_trains_near_fp32_with_a_scaled_loss(framework: str) -> None:
    """The scale changes nothing but what is lost below, or beyond, fp16's range; beyond, the step is refused."""
    source = toy_weights(toy_config(init_method_std=0.05))
    half, full = build(framework, source, fp16=True), build(framework, source)
    assert half.param_dtype == "float16"
    for step in range(5):
        batches = [toy_batch(source.config, RAGGED, seed=step)]
        actual = mean_step(half, batches, 1e-3, 0.1, loss_scale=1024.0)
        expected = mean_step(full, batches, 1e-3, 0.1)
        assert actual.applied
        assert actual.loss == pytest.approx(expected.loss, rel=1e-2)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=5e-2)
    held = snapshot(half)
    refused = mean_step(half, batches, 1e-3, 0.1, loss_scale=2.0**40)
    assert not refused.applied
    assert np.isfinite(refused.loss)
    assert not np.isfinite(refused.grad_norm)
    assert_same_bits(snapshot(half), held)
    assert {kind: held.read("decoder.final_layernorm.weight", kind).dtype.name for kind in held.kinds()} == {
        "model": "float16",
        "master": "float32",
        "exp_avg": "float32",
        "exp_avg_sq": "float32",
    }
    assert half.optimizer_step == 5
    assert mean_step(half, batches, 1e-3, 0.1, loss_scale=1024.0).applied


def test_a_loss_scale_keeps_gradients_that_fp16_loses(framework: str) -> None:
    """Where gradients are below fp16's smallest number, 6e-8, the scale brings them back."""
    source = toy_weights(toy_config(init_method_std=0.05, untie_embeddings_and_output_weights=True))
    source.read("output_layer.weight")[...] *= 2.0**-10  # what reaches the layers is this much smaller

    def first_moment(loss_scale: float, fp16: bool) -> np.ndarray:
        engine = build(framework, source, fp16=fp16, clip_grad=0.0)
        mean_step(engine, [toy_batch(source.config, RAGGED)], 1e-3, 0.0, loss_scale=loss_scale)
        return snapshot(engine).read("decoder.layers.0.mlp.linear_fc1.weight", "exp_avg")

    expected = first_moment(1.0, fp16=False)
    errors = [np.linalg.norm(first_moment(scale, fp16=True) - expected) for scale in (1.0, 2.0**14)]
    assert errors[0] > 10 * errors[1]
    assert errors[1] < 16 * FP16_ROUNDING * np.linalg.norm(expected)


def test_an_engine_without_training_refuses_to_train(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(framework, source, training=False)
    with pytest.raises(ValueError, match="training"):
        mean_step(engine, [toy_batch(source.config, (5,))], 1e-3, 0.0)


# --- both frameworks


@pytest.mark.parametrize("toy", TOYS)
def test_fp16_losses_and_gradients_are_the_other_backends(both_frameworks: tuple[str, str], toy: str) -> None:
    """Each of some 50 operations between a weight and its gradient rounds once, at random: on either backend that came
    to at most 9 roundings, and to 7 between the two."""
    source = toy_weights(TOYS[toy])
    batches = [toy_batch(source.config, RAGGED, seed=1, trained=0.7)]
    engines = [build(framework, source, fp16=True) for framework in both_frameworks]
    (expected_loss, expected), (loss, gradients) = (mean_gradients(engine, batches) for engine in engines)
    assert loss == pytest.approx(expected_loss, rel=FP16_ROUNDING)
    assert_close_gradients(gradients, expected, rtol=16 * FP16_ROUNDING)
    for engine in engines:
        logits = engine.logits(batches[0])
        np.testing.assert_array_equal(logits, logits.astype(np.float16))
        np.testing.assert_allclose(logits, engines[0].logits(batches[0]), atol=1e-2, rtol=0)


def test_fp16_trains_alike_and_its_state_is_the_same_to_the_bit(both_frameworks: tuple[str, str]) -> None:
    """Where training led the weights differs by a hundredth of the way (Adam turns rounding errors of the smallest
    gradients into whole steps); what one backend leaves the other takes, and leaves again without a change."""
    source = toy_weights(toy_config(init_method_std=0.05))
    engines = [build(framework, source, adam_beta2=0.95, fp16=True) for framework in both_frameworks]
    for step in range(10):
        batches = [toy_batch(source.config, RAGGED, seed=100 + 2 * step + i, trained=0.7) for i in range(2)]
        scale = 2.0**40 if step == 4 else 1024.0
        results = [mean_step(engine, batches, lr=1e-3, weight_decay=0.1, loss_scale=scale) for engine in engines]
        assert [result.applied for result in results] == [step != 4] * 2
        assert results[1].loss == pytest.approx(results[0].loss, rel=FP16_ROUNDING), f"step {step}"
    saved = [snapshot(engine) for engine in engines]
    for name in tensor_table(source.config):
        for kind, start in (("master", source.read(name)), ("exp_avg", 0.0), ("exp_avg_sq", 0.0)):
            one, other = (state.read(name, kind) for state in saved)
            assert np.linalg.norm(one - other) < 0.03 * np.linalg.norm(one - start), f"{kind} {name}"
        for state in saved:
            np.testing.assert_array_equal(state.read(name), state.read(name, "master").astype(np.float16))
    for framework, engine, state in zip(reversed(both_frameworks), engines, saved):
        heir = build(framework, state, fp16=True)
        heir.load_optimizer(state, engine.optimizer_step)
        assert_same_bits(snapshot(heir), state)


def test_backends_train_alike(both_frameworks: tuple[str, str]) -> None:
    source = toy_weights(toy_config(init_method_std=0.05))
    engines = [build(framework, source, adam_beta2=0.95) for framework in both_frameworks]
    for step in range(20):
        batches = [toy_batch(source.config, RAGGED, seed=100 + 2 * step + i, trained=0.7) for i in range(2)]
        losses = [mean_step(engine, batches, lr=1e-3, weight_decay=0.1).loss for engine in engines]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4), f"step {step}"
