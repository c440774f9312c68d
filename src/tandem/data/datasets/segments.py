"""Documents inside one sample: their lengths and their positions."""

from __future__ import annotations

import numpy as np


def lengths_from_ends(is_end: np.ndarray) -> tuple[int, ...]:
    """Lengths of the documents in a sample, each ending where `is_end` [t] says so, the last one anyhow."""
    bounds = np.concatenate([[0], np.flatnonzero(is_end) + 1, [len(is_end)]])
    return tuple(length for length in np.diff(bounds).tolist() if length)


def restarting_positions(lengths: tuple[int, ...]) -> np.ndarray:
    """int32 [t]: 0, 1, 2 .. within each document."""
    return np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
