"""Batches and weights of no meaning, for steps that are measured or compared."""

from __future__ import annotations

import numpy as np

from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, MicroBatch, Sample, collate
from tandem.models.config import ModelConfig
from tandem.training.objectives import MeanLoss, RankBatch

DRAWN = 2**22  # random numbers that a tensor repeats


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


def weights_of(batches: list[MicroBatch], data_ranks: int = 1) -> list[np.ndarray]:
    """The weights of a mean over all data ranks' tokens. Each rank has as many as this one."""
    trained = sum(batch.trained_tokens for batch in batches) * data_ranks
    return MeanLoss()(None, RankBatch(batches, trained)).weights


class RepeatingSource(RandomSource):
    """Random weights that repeat themselves: made as fast as memory is written, of any size.

    Only for speed. A row of such a matrix may be another one moved, which no trained model has.
    """

    def _normal(self, name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
        size = int(np.prod(shape))
        drawn = super()._normal(name, (min(size, DRAWN),), std)
        return np.resize(drawn, shape)
