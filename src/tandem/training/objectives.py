"""What training minimises, given as a weight for each token.

A step uses the gradient of the sum of weight * -log p(label) over the tokens of the global batch. The weights are plain
numbers: an objective computes the derivatives of its loss by the log-probabilities, and the engine computes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tandem.data.batch import IGNORE, MicroBatch


@dataclass(frozen=True)
class RankBatch:
    """The batch of one data rank in a step.

    Attributes:
        micro_batches: those of this rank.
        trained_tokens: number of labels that count, over all data ranks.
    """

    micro_batches: Sequence[MicroBatch]
    trained_tokens: int


class Objective(Protocol):
    """What a run minimises.

    Attributes:
        needs_log_probabilities: whether the weights depend on the model's log-probabilities. Each step then needs one
            more forward pass.
    """

    needs_log_probabilities: bool

    def __call__(
        self, log_probabilities: Sequence[np.ndarray] | None, batch: RankBatch
    ) -> tuple[float | None, list[np.ndarray]]:
        """The loss, and the weight of each token.

        Args:
            log_probabilities: of the labels of each micro-batch, [t]; None when the weights do not depend on them.

        Returns:
            This rank's part of the reported loss; None when that is the weighted sum, which the engine computes. And
            the weights of each micro-batch, float64 [t]: minus the derivative of the loss by each log-probability.

        Raises:
            UntrainedError: no label of the global batch counts.
        """
        ...


class UntrainedError(ValueError):
    """No label of the global batch counts, so there is no mean loss. All ranks raise this error together."""

    def __init__(self) -> None:
        super().__init__("no label of the global batch is trained: all labels are masked")


class MeanLoss:
    """`Objective` of pretraining and fine-tuning: all trained tokens of the global batch have the same weight."""

    needs_log_probabilities = False

    def __call__(
        self, log_probabilities: Sequence[np.ndarray] | None, batch: RankBatch
    ) -> tuple[float | None, list[np.ndarray]]:
        if not batch.trained_tokens:
            raise UntrainedError
        weight = 1 / batch.trained_tokens
        return None, [np.where(micro_batch.labels == IGNORE, 0.0, weight) for micro_batch in batch.micro_batches]
