"""The loss of every engine: of tokens, weighted, in chunks and micro-batches, as Hugging Face's model gives it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from parts import set_logits_chunk_bytes
from reference import (
    Reference,
    any_weights,
    assert_close_gradients,
    mean_gradients,
    mean_step,
    snapshot,
    toy_batch,
    toy_samples,
    toy_weights,
    untrained,
)
from test_engine import FP16_ROUNDING, RAGGED, assert_same_bits, build

from tandem.backends.interface import StepResult
from tandem.data.batch import IGNORE, AskedBatch, collate
from tandem.errors import UserError
from tandem.models.tensors import tensor_table
from toys import TOYS, toy_config

# --- the loss


def test_evaluate_equals_the_training_loss(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    batch = toy_batch(source.config, RAGGED, trained=0.5)
    total, count = build(framework, source, training=False).evaluate([batch])
    assert count == batch.trained_tokens
    assert total / count == pytest.approx(mean_gradients(build(framework, source), [batch])[0], rel=1e-6)


def test_log_probabilities_equal_hugging_face(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    batches = [
        toy_batch(source.config, RAGGED, trained=0.5),
        collate([untrained(sample) for sample in toy_samples(source.config, (5, 3))]),
        toy_batch(source.config, (9, 4), seed=2),
    ]
    found = build(framework, source, training=False).log_probabilities(batches)
    for values, batch in zip(found, batches, strict=True):
        expected = torch.log_softmax(Reference(source).logits(batch).detach(), -1).numpy()
        trained = batch.labels != IGNORE
        of_labels = expected[np.arange(len(trained)), np.where(trained, batch.labels, 0)]
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, np.where(trained, of_labels, 0.0), atol=2e-5, rtol=0)


def test_label_scores_equal_hugging_face(framework: str) -> None:
    """Several labels of one position, positions in any order, and the most likely token of each."""
    source = toy_weights(TOYS["qwen3-untied"])
    plain = toy_batch(source.config, RAGGED)
    expected = torch.log_softmax(Reference(source).logits(plain).detach(), -1).numpy()
    rows = np.array([6, 0, 55, 6, 6, 31])
    labels = np.array([210, 3, 0, int(expected[6].argmax()), 17, 99], np.int32)
    batch = AskedBatch.of(plain, rows, labels)
    engine = build(framework, source, training=False)
    for values, tokens in engine.label_scores([batch, batch]):
        np.testing.assert_allclose(values, expected[rows, labels], atol=2e-5, rtol=0)
        assert tokens.tolist() == expected[rows].argmax(1).tolist()


@pytest.mark.parametrize("field", ["tokens", "labels"])
@pytest.mark.parametrize("wrong", [-1, 211])
def test_ids_beyond_the_vocabulary_are_named(framework: str, field: str, wrong: int) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, RAGGED)
    ids = getattr(batch, field).copy()
    ids[3] = wrong
    damaged = dataclasses.replace(batch, **{field: ids})
    engine = build(framework, source)
    for use in (
        lambda batch: engine.evaluate([batch]),
        engine.logits,
        lambda batch: mean_step(engine, [batch], 1e-3, 0.0),
    ):
        with pytest.raises(UserError, match=f"{field} of a micro-batch span .*another tokenizer"):
            use(damaged)


def test_evaluate_without_trained_tokens_is_zero(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    batch = collate([untrained(sample) for sample in toy_samples(source.config, (5, 3))])
    assert build(framework, source, training=False).evaluate([batch]) == (0.0, 0)


@pytest.mark.parametrize("toy", ["qwen3-tied", "qwen3-untied"])
def test_chunked_loss_equals_unchunked(framework: str, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_weights(TOYS[toy])
    batches = [toy_batch(source.config, RAGGED), toy_batch(source.config, (9, 4), seed=2)]
    engine, weights = build(framework, source), any_weights(batches)
    whole_loss, whole = engine.loss_and_gradients(batches, weights)
    set_logits_chunk_bytes(monkeypatch, framework, 5 * source.config.vocab_size * 4)
    loss, gradients = engine.loss_and_gradients(batches, weights)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert_close_gradients(gradients, whole, rtol=1e-5)


PEAK_OF_A_STEP = """
import sys
from collections.abc import Callable
import numpy as np
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig

def peak_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

framework, config = sys.argv[1], ModelConfig(
    model_type="qwen3", num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=1, num_query_groups=1,
    kv_channels=16, vocab_size=65536, max_position_embeddings=4096, norm_epsilon=1e-6, rotary_base=1e4)
engine = create_engine(framework, config, EngineSettings(device="cpu"))
engine.load_weights(RandomSource(config, 0))
def step(tokens):
    ids = np.arange(tokens, dtype=np.int32)
    batch = MicroBatch(ids, ids, ids % 512, np.arange(0, tokens + 1, 512, dtype=np.int32))
    engine.train_step([batch], [np.full(tokens, 1 / tokens)], 1e-3, 0.0)
step(512)
before = peak_mib()
step(4096)
print(peak_mib() - before)
"""


@pytest.mark.slow("sizes")
def test_full_logits_never_exist(framework: str) -> None:
    """4096 x 65536 logits take 1024 MiB, and their gradient as much; the step may add a quarter of the two."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from /proc")
    command = [sys.executable, "-c", PEAK_OF_A_STEP, framework]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 512


# --- gradient accumulation


@pytest.mark.parametrize("toy", ["qwen3-tied", "qwen3-untied"])
def test_the_split_into_micro_batches_does_not_matter(framework: str, toy: str) -> None:
    source = toy_weights(TOYS[toy])
    samples = toy_samples(source.config, (7, 1, 19, 12, 12, 5, 30, 2), trained=0.5)
    samples[3] = untrained(samples[3])
    engine = build(framework, source)
    whole_loss, whole = mean_gradients(engine, [collate(samples)])
    for size in (4, 1):
        batches = [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
        loss, gradients = mean_gradients(engine, batches)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        assert_close_gradients(gradients, whole, rtol=1e-5)


def test_a_first_micro_batch_without_trained_tokens(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(framework, source)
    trained = toy_batch(source.config, RAGGED)
    empty = collate([untrained(sample) for sample in toy_samples(source.config, (9,), seed=3)])
    alone_loss, alone = mean_gradients(engine, [trained])
    mean_gradients(engine, [toy_batch(source.config, (11,), seed=4)])  # leaves something else in the buffers
    loss, gradients = mean_gradients(engine, [empty, trained, empty])
    assert loss == pytest.approx(alone_loss, rel=1e-6)
    assert_close_gradients(gradients, alone, rtol=1e-6)


def test_no_trained_token_at_all_is_an_error(framework: str) -> None:
    """There is no mean of nothing; an engine that is given weights for it changes nothing."""
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(framework, source)
    batch = collate([untrained(sample) for sample in toy_samples(source.config, (9, 3))])
    with pytest.raises(ValueError, match="trained"):
        mean_step(engine, [batch], lr=1e-3, weight_decay=0.0)
    result = engine.train_step([batch], [np.ones(12)], lr=1e-3, weight_decay=0.1)
    assert result == StepResult(loss=0.0, grad_norm=0.0, trained_tokens=0, applied=False)
    assert engine.optimizer_step == 0
    assert_same_bits(snapshot(engine), snapshot(build(framework, source)))


# --- weights of tokens


@pytest.mark.parametrize("toy", ["qwen3-tied", "qwen3-untied"])
def test_any_weights_give_the_gradient_of_the_weighted_sum(framework: str, toy: str) -> None:
    """Over two micro-batches, and of either sign: what objectives beyond the mean rest on."""
    source = toy_weights(TOYS[toy])
    batches = [toy_batch(source.config, RAGGED, seed=1 + i, trained=0.7) for i in range(2)]
    weights = any_weights(batches)
    weights[0][::3] *= -1
    expected_loss, expected = Reference(source).loss_and_gradients(batches, weights)
    loss, gradients = build(framework, source).loss_and_gradients(batches, weights)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-4)


def test_small_weights_keep_their_digits_in_fp16(framework: str) -> None:
    source = toy_weights(toy_config(init_method_std=0.05))
    batches = [toy_batch(source.config, RAGGED, seed=seed, trained=0.7) for seed in range(2)]
    results, moments = [], []
    for fp16, loss_scale in ((False, 1.0), (True, 2.0**14)):
        engine = build(framework, source, fp16=fp16, clip_grad=0.0)
        results.append(engine.train_step(batches, any_weights(batches), 1e-3, 0.0, loss_scale=loss_scale))
        moments.append(snapshot(engine))
    assert results[1].loss == pytest.approx(results[0].loss, rel=FP16_ROUNDING)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=16 * FP16_ROUNDING)
    names = list(tensor_table(source.config))
    actual, expected = ({name: moment.read(name, "exp_avg") for name in names} for moment in (moments[1], moments[0]))
    assert_close_gradients(actual, expected, rtol=16 * FP16_ROUNDING)


def test_a_weight_for_each_token_or_an_error(framework: str) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(framework, source)
    batch = toy_batch(source.config, RAGGED)
    for weights in ([], [np.ones(3)]):
        with pytest.raises(ValueError, match=r"zip|weights have shape \[3\]; expected \[56\], as labels"):
            engine.train_step([batch], weights, 1e-3, 0.1)
