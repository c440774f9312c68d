"""What training minimises, as weights of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tandem.data.batch import IGNORE, Sample, collate
from tandem.training.objectives import MeanLoss, Objective, RankBatch, UntrainedError


def test_the_mean_weighs_each_trained_token_of_the_global_batch_the_same() -> None:
    objective: Objective = MeanLoss()
    labels = [np.array([3, IGNORE, 1], np.int32), np.array([IGNORE], np.int32)]
    positions = [np.arange(len(one), dtype=np.int32) for one in labels]
    batches = [collate([Sample(tokens, one, tokens, (len(one),))]) for tokens, one in zip(positions, labels)]
    weighed = objective(None, RankBatch(batches, trained_tokens=8))
    weights = weighed.weights
    assert not objective.needs_log_probabilities
    assert weighed.loss is None
    np.testing.assert_array_equal(weights[0], [1 / 8, 0, 1 / 8])
    np.testing.assert_array_equal(weights[1], [0])
    assert {one.dtype for one in weights} == {np.dtype(np.float64)}


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(UntrainedError, match="no label of the global batch is trained"):
        MeanLoss()(None, RankBatch([], trained_tokens=0))
