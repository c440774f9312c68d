"""Cut a rank's part out of a global array, and put it back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.parallel.layout import Box


def cut(tensor: np.ndarray, boxes: Sequence[Box], dim: int | None) -> np.ndarray:
    """The boxes of a global array, stacked along `dim`; a view when there is only one."""
    parts = [tensor[_index(box)] for box in boxes]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=dim)


def paste(tensor: np.ndarray, part: np.ndarray, boxes: Sequence[Box], dim: int | None) -> None:
    """Write a part into its place in a global array: the inverse of `cut`."""
    axis = dim or 0
    ends = np.cumsum([box[axis][1] - box[axis][0] for box in boxes])[:-1]
    for box, piece in zip(boxes, np.split(part, ends, axis=axis)):
        tensor[_index(box)] = piece


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
