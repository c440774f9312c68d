"""What training minimises, as the weight of each token.

A step follows the gradient of the sum of weight * -log p(label) over the tokens of the global batch. The weights are
numbers by then: an objective takes the derivatives of its loss by the log-probabilities, the engine takes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tandem.data.batch import IGNORE, MicroBatch


@dataclass(frozen=True)
class RankBatch:
    """What a data rank trains in a step.

    Attributes:
        micro_batches: of this rank.
        trained_tokens: labels that count, in the micro-batches of all data ranks.
    """

    micro_batches: Sequence[MicroBatch]
    trained_tokens: int


class Objective(Protocol):
    """What a run minimises.

    Attributes:
        needs_log_probabilities: its weights depend on what the model computes, so each step needs one more forward
            pass, before it.
    """

    needs_log_probabilities: bool

    def __call__(
        self, log_probabilities: Sequence[np.ndarray] | None, batch: RankBatch
    ) -> tuple[float | None, list[np.ndarray]]:
        """The loss, and the weight of each token.

        Args:
            log_probabilities: of the labels of each micro-batch, [t]; None where none are needed.

        Returns:
            This rank's part of the loss that is reported, None for the weighted sum itself, which the engine knows; and
            for each micro-batch minus the derivative of the loss by each log-probability, float64 [t].

        Raises:
            UntrainedError: no label of the global batch counts.
        """
        ...


class UntrainedError(ValueError):
    """No label of the global batch counts, so there is no mean of their losses. All ranks raise it together."""

    def __init__(self) -> None:
        super().__init__("no label of the global batch is trained: every one of them is masked")


class MeanLoss:
    """`Objective` of pretraining and fine-tuning: each trained token of the global batch weighs the same."""

    needs_log_probabilities = False

    def __call__(
        self, log_probabilities: Sequence[np.ndarray] | None, batch: RankBatch
    ) -> tuple[float | None, list[np.ndarray]]:
        if not batch.trained_tokens:
            raise UntrainedError
        weight = 1 / batch.trained_tokens
        return None, [np.where(micro_batch.labels == IGNORE, 0.0, weight) for micro_batch in batch.micro_batches]
