"""What the passes of both frameworks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from tandem.data.batch import IGNORE, MicroBatch
from tandem.parallel.pipeline import Action

T = TypeVar("T")  # what a forward pass keeps for its backward pass


def follow(
    schedule: Iterable[Action], forward: Callable[[Action], tuple[float, T]], backward: Callable[[Action, T], None]
) -> float:
    """Run the passes of a schedule, each backward pass with what its forward pass kept. Returns the sum of the losses
    that forward passes give."""
    total = 0.0
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
