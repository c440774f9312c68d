"""What training minimises, given as a weight for each token.

A step uses the gradient of the sum of weight * -log p(label) over the tokens of the global batch. The weights are plain
numbers: an objective computes the derivatives of its loss by the log-probabilities, and the engine computes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tandem.backends.interface import Engine
from tandem.data.batch import IGNORE, MicroBatch
from tandem.launch.world import Communicator
from tandem.parallel.grid import Grid
from tandem.training.logs.log import perplexity

Total = Callable[[Sequence[float]], list[float]]  # the sum of each number over all data ranks; collective


def on_one_rank(values: Sequence[float]) -> list[float]:
    """`Total` where there is one data rank."""
    return list(values)


def over_data_ranks(communicator: Communicator, grid: Grid) -> Total:
    """`Total` of a job. Tensor and pipeline ranks of a data rank have the same samples."""
    ranks = grid.group("data", grid.place(0))

    def total(values: Sequence[float]) -> list[float]:
        everyone = communicator.all_gather(list(values))
        return [sum(column) for column in zip(*(everyone[rank] for rank in ranks))]

    return total


@dataclass(frozen=True)
class RankBatch:
    """The batch of one data rank in a step.

    Attributes:
        micro_batches: those of this rank.
        trained_tokens: number of labels that count, over all data ranks.
        total: for other sums over all data ranks.
    """

    micro_batches: Sequence[MicroBatch]
    trained_tokens: int
    total: Total = on_one_rank


@dataclass(frozen=True)
class Weighed:
    """What an objective says of a batch.

    Attributes:
        weights: of the tokens of each micro-batch, float64 [t]: minus the derivative of the loss by each
            log-probability.
        loss: of the global batch, the same on every rank; None when it is the weighted sum, which the engine computes.
        metrics: of the global batch, by TRL's names.
    """

    weights: list[np.ndarray]
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: the mean over what counts: tokens, or pairs.
        tokens: number of labels that count.
        metrics: as in `Weighed`.
    """

    loss: float
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


class Objective(Protocol):
    """What a run minimises.

    Attributes:
        needs_log_probabilities: whether the weights depend on the model's log-probabilities. Each step then needs one
            more forward pass.
        needs_reference: whether the loss compares the model with a reference, whose log-probabilities are in the
            batches' answers.
    """

    @property
    def needs_log_probabilities(self) -> bool: ...

    @property
    def needs_reference(self) -> bool: ...

    def __call__(self, log_probabilities: Sequence[np.ndarray] | None, batch: RankBatch) -> Weighed:
        """The loss, and the weight of each token. Collective over data ranks.

        Args:
            log_probabilities: of the labels of each micro-batch, [t]; None when the weights do not depend on them.

        Raises:
            UntrainedError: no label of the global batch counts.
        """
        ...

    def evaluate(self, engine: Engine, batches: Iterable[Sequence[MicroBatch]], total: Total) -> Evaluation:
        """The loss over a set of batches, each this rank's micro-batches of it. Collective.

        Raises:
            UntrainedError: no label counts.
        """
        ...


class UntrainedError(ValueError):
    """No label of the global batch counts, so there is no mean loss. All ranks raise this error together."""

    def __init__(self) -> None:
        super().__init__("no label of the global batch is trained: all labels are masked")


class MeanLoss:
    """`Objective` of pretraining and fine-tuning: all trained tokens of the global batch have the same weight."""

    needs_log_probabilities = needs_reference = False

    def __call__(self, log_probabilities: Sequence[np.ndarray] | None, batch: RankBatch) -> Weighed:
        if not batch.trained_tokens:
            raise UntrainedError
        weight = 1 / batch.trained_tokens
        return Weighed([np.where(micro_batch.labels == IGNORE, 0.0, weight) for micro_batch in batch.micro_batches])

    def evaluate(self, engine: Engine, batches: Iterable[Sequence[MicroBatch]], total: Total) -> Evaluation:
        loss, tokens = 0.0, 0
        for micro_batches in batches:
            of_batch, trained = engine.evaluate(micro_batches)
            loss, tokens = loss + of_batch, tokens + trained
        if not tokens:
            raise UntrainedError
        return Evaluation(loss / tokens, tokens)


MEAN_LOSS = MeanLoss()
