"""Toy weights and batches for engines. Imports no framework."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tandem.backends.interface import Engine, StepResult
from tandem.checkpoints.interface import RANDOM, Companions, TensorKind, TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, MicroBatch, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.slices import Part, cut
from tandem.training.objectives import MeanLoss, RankBatch


class MemorySource(TensorSource):
    """Global tensors held in memory, by kind and name."""

    location, format = "memory", RANDOM

    def __init__(self, config: ModelConfig, tensors: dict[TensorKind, dict[str, np.ndarray]]) -> None:
        self.config = config
        self.companions = Companions()
        self._tensors = tensors

    def kinds(self) -> tuple[TensorKind, ...]:
        return tuple(self._tensors)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._tensors[kind][name].dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self._tensors[kind][name]

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return cut(self.read(name, kind), part)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        yield self.read_part(name, part, kind)


def toy_weights(config: ModelConfig, seed: int = 0) -> MemorySource:
    """Random weights with norms away from one, so that a forgotten norm weight shows."""
    source = RandomSource(config, seed)
    generator = np.random.default_rng(seed)
    weights = {}
    for name, spec in tensor_table(config).items():
        weights[name] = source.read(name)
        if len(spec.shape) == 1:
            weights[name] = weights[name] + generator.normal(0, 0.2, spec.shape).astype(np.float32)
        if "magnitude" in name:
            weights[name] = np.abs(weights[name]) + np.float32(0.5)
    return MemorySource(config, {"model": weights})


def snapshot(engine: Engine) -> MemorySource:
    """A copy of everything that a checkpoint of `engine` would hold."""
    tensors: dict[TensorKind, dict[str, np.ndarray]] = {}
    for kind, shard, array in engine.tensors():
        tensors.setdefault(kind, {})[shard.spec.name] = array.copy()
    return MemorySource(engine.config, tensors)


def toy_samples(config: ModelConfig, lengths: Iterable[int], seed: int = 0, trained: float = 1.0) -> list[Sample]:
    """One random document per length; about the share `trained` of the labels counts, and at least one."""
    generator = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        tokens = generator.integers(0, config.vocab_size, length + 1, dtype=np.int32)
        labels = np.where(generator.random(length) < trained, tokens[1:], IGNORE).astype(np.int32)
        labels[-1] = tokens[-1]
        samples.append(Sample(tokens[:-1], labels, np.arange(length, dtype=np.int32), (length,)))
    return samples


def untrained(sample: Sample) -> Sample:
    """The same sample with no label that counts."""
    return Sample(sample.tokens, np.full_like(sample.labels, IGNORE), sample.position_ids, sample.lengths)


def toy_batch(config: ModelConfig, lengths: Iterable[int], seed: int = 0, trained: float = 1.0) -> MicroBatch:
    return collate(toy_samples(config, lengths, seed, trained))


def mean_weights(batches: Sequence[MicroBatch]) -> list[np.ndarray]:
    """Of the tokens of all batches of a step, when the loss is the mean over those that are trained."""
    return MeanLoss()(None, RankBatch(batches, sum(batch.trained_tokens for batch in batches))).weights


def any_weights(batches: Sequence[MicroBatch], seed: int = 0) -> list[np.ndarray]:
    """Weights over three orders of magnitude, some of them 0; of tokens that are not trained, too."""
    generator = np.random.default_rng(seed)
    sizes = [len(batch.tokens) for batch in batches]
    return [10 ** generator.uniform(-4, -1, size) * (generator.random(size) < 0.9) for size in sizes]


def mean_step(engine: Engine, batches: Sequence[MicroBatch], *settings: float, **named: float) -> StepResult:
    """A train step on the mean over the trained tokens."""
    return engine.train_step(batches, mean_weights(batches), *settings, **named)


def mean_gradients(engine: Engine, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, np.ndarray]]:
    return engine.loss_and_gradients(batches, mean_weights(batches))


def assert_close_gradients(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float, atol: float = 1e-7
) -> None:
    """Each gradient within `rtol` of the expected one in Frobenius norm, plus `atol` per element."""
    assert list(actual) == list(expected)
    for name, gradient in expected.items():
        assert actual[name].shape == gradient.shape, name
        error = np.linalg.norm(actual[name].astype(np.float64) - gradient)
        limit = rtol * np.linalg.norm(gradient.astype(np.float64)) + atol * gradient.size**0.5
        assert error <= limit, f"{name}: off by {error:.3g}, allowed {limit:.3g}"
