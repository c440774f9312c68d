"""What the forward and backward passes of both frameworks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tandem.data.batch import IGNORE, MicroBatch
from tandem.parallel.pipeline import Action

T = TypeVar("T")  # what a forward pass keeps for its backward pass


@dataclass(frozen=True)
class WeightedBatch(MicroBatch):
    """A micro-batch to train on.

    Attributes:
        weights: of each of its tokens in the loss, float64 [t].
        step: the updates before this one.
        balance: the weight of its losses that balance experts.
    """

    weights: np.ndarray
    step: int = 0
    balance: float = 0.0

    @classmethod
    def of(cls, batch: MicroBatch, weights: np.ndarray, step: int, balance: float = 0.0) -> WeightedBatch:
        """Add weights to a batch. Raises ValueError unless there is one weight for each token."""
        if weights.shape != batch.labels.shape:
            raise ValueError(
                f"weights have shape {list(weights.shape)}; expected {list(batch.labels.shape)}, as labels"
            )
        return cls(batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens, weights, step, balance)


# One token without a label, for a rank that must compute as often as others.
UNTRAINED = WeightedBatch(
    tokens=np.zeros(1, np.int32),
    labels=np.full(1, IGNORE, np.int32),
    position_ids=np.zeros(1, np.int32),
    cu_seqlens=np.array([0, 1], np.int32),
    weights=np.zeros(1),
)


def follow(
    schedule: Iterable[Action], forward: Callable[[Action], tuple[Any, T]], backward: Callable[[Action, T], None]
) -> Any:
    """Run the passes of a schedule. A backward pass gets what its forward pass kept.

    Returns the sum of the losses that the forward passes return, as numbers or the framework's.
    """
    total: Any = 0.0
    kept: dict[tuple[int, int], T] = {}
    for action in schedule:
        key = (action.chunk, action.micro_batch)
        if action.forward:
            loss, kept[key] = forward(action)
            total += loss
        else:
            backward(action, kept.pop(key))
    return total


def trained_rows(batch: MicroBatch) -> np.ndarray:
    """The positions whose labels count."""
    return np.flatnonzero(batch.labels != IGNORE)
