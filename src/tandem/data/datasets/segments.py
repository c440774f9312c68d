"""The lengths and positions of the documents in a sample."""

from __future__ import annotations

import numpy as np


def lengths_from_ends(is_end: np.ndarray) -> tuple[int, ...]:
    """Lengths of the documents in a sample. A document ends where `is_end` [t] is true, and at the end of the sample.

    >>> lengths_from_ends(np.array([False, True, False]))
    (2, 1)
    """
    bounds = np.concatenate([[0], np.flatnonzero(is_end) + 1, [len(is_end)]])
    return tuple(length for length in np.diff(bounds).tolist() if length)


def restarting_positions(lengths: tuple[int, ...]) -> np.ndarray:
    """Positions 0, 1, 2, .. in each document, int32 [t].

    >>> restarting_positions((2, 3))
    array([0, 1, 0, 1, 2], dtype=int32)
    """
    return np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
