"""Weights of tokens for steps whose loss is the mean, as in pretraining and fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.data.batch import MicroBatch
from tandem.training.objectives import MeanLoss, RankBatch


def mean_weights(batches: Sequence[MicroBatch]) -> list[np.ndarray]:
    """Of the tokens of all batches of a step."""
    return MeanLoss()(None, RankBatch(batches, sum(batch.trained_tokens for batch in batches))).weights
