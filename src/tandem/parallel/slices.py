"""A part of a global array: name it, cut it out, put it back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Half-open ranges, one per dimension, within a global tensor.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """Boxes of a global tensor, stacked along `dim`. Most parts are one box; then `dim` does not matter."""

    boxes: tuple[Box, ...]
    dim: int = 0

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        return cls((tuple((0, size) for size in shape),))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = [stop - start for start, stop in self.boxes[0]]
        shape[self.dim] = sum(box[self.dim][1] - box[self.dim][0] for box in self.boxes)
        return tuple(shape)

    def rows(self, start: int, stop: int) -> Part:
        """Rows `start` to `stop` of this part, as a part of the same global tensor; possibly empty."""
        if self.dim != 0:
            return Part(tuple(_narrow(box, start, stop) for box in self.boxes), self.dim)
        found, first = [], 0
        for box in self.boxes:
            size = box[0][1] - box[0][0]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                found.append(_narrow(box, low, high))
            first += size
        return Part(tuple(found) or (_narrow(self.boxes[0], 0, 0),))


def cut(tensor: np.ndarray, part: Part) -> np.ndarray:
    """`part` of a global array; a view when it is one box."""
    pieces = [tensor[_index(box)] for box in part.boxes]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=part.dim)


def paste(tensor: np.ndarray, values: np.ndarray, part: Part) -> None:
    """Write the values of `part` into their place in a global array: the inverse of `cut`."""
    ends = np.cumsum([box[part.dim][1] - box[part.dim][0] for box in part.boxes])[:-1]
    for box, piece in zip(part.boxes, np.split(values, ends, axis=part.dim)):
        tensor[_index(box)] = piece


def _narrow(box: Box, start: int, stop: int) -> Box:
    """The box's own rows `start` to `stop`."""
    return ((box[0][0] + start, box[0][0] + stop), *box[1:])


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
