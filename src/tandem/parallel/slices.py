"""Parts of a global array: to name them, cut them out and put them back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Half-open ranges, one per dimension, within a global tensor.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """Boxes of a global tensor, stacked along `dim`. Most parts are one box; then `dim` does not matter.

    >>> part = Part((((0, 2), (0, 3)), ((4, 6), (0, 3))))
    >>> part.shape
    (4, 3)
    >>> part.rows(1, 3)
    Part(boxes=(((1, 2), (0, 3)), ((4, 5), (0, 3))), dim=0)
    """

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
        """Rows `start` to `stop` of this part, as a part of the same global tensor. It may be empty."""
        if self.dim != 0:
            return Part(tuple(_narrow(box, start, stop) for box in self.boxes), self.dim)
        boxes, first = [], 0
        for box in self.boxes:
            size = box[0][1] - box[0][0]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                boxes.append(_narrow(box, low, high))
            first += size
        return Part(tuple(boxes) or (_narrow(self.boxes[0], 0, 0),))


def cut(tensor: np.ndarray, part: Part) -> np.ndarray:
    """`part` of a global array; a view when it is one box."""
    pieces = [tensor[_index(box)] for box in part.boxes]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=part.dim)


def cut_rows(rows: np.ndarray, first: int, part: Part) -> np.ndarray:
    """What `part` of a global array takes from some rows of the array, which begin at row `first`. It may be no rows.

    For consecutive blocks of rows, the results stacked are what `cut` takes from the whole array.

    >>> whole = np.arange(6).reshape(3, 2)
    >>> cut_rows(whole[1:3], 1, Part((((0, 2), (0, 1)),)))
    array([[2]])
    """
    pieces = []
    last = first + len(rows)
    # Of hundreds of boxes, a few have some of the rows.
    near = [box for box in part.boxes if box[0][0] < last and box[0][1] > first]
    for box in near or part.boxes[:1]:
        low, high = (min(max(row - first, 0), len(rows)) for row in box[0])
        pieces.append(rows[_index(((low, high), *box[1:]))])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=part.dim)


def overlaps(left: Part, right: Part) -> bool:
    """Whether two parts of the same tensor share any number."""
    return any(_common(a, b) is not None for a in left.boxes for b in right.boxes)


def transfer(values: np.ndarray, part: Part, target: np.ndarray, target_part: Part) -> None:
    """Copy what `part` and `target_part` share from `values` into `target`, which hold these parts."""
    for box, place in zip(part.boxes, _places(part)):
        for target_box, target_place in zip(target_part.boxes, _places(target_part)):
            common = _common(box, target_box)
            if common is not None:
                target[_within(common, target_box, target_place)] = values[_within(common, box, place)]


def tiles(parts: Iterable[Part], shape: tuple[int, ...]) -> bool:
    """Whether parts cover an array of `shape`, each number once.

    >>> tiles([Part((((0, 2), (0, 4)),)), Part((((2, 3), (0, 4)),))], (3, 4))
    True
    """
    boxes = sorted(box for part in parts for box in part.boxes if all(start < stop for start, stop in box))
    if any(len(box) != len(shape) or any(a < 0 or b > size for (a, b), size in zip(box, shape)) for box in boxes):
        return False
    if sum(math.prod(stop - start for start, stop in box) for box in boxes) != math.prod(shape):
        return False
    for number, box in enumerate(boxes):
        for other in itertools.islice(boxes, number + 1, None):
            if other[0][0] >= box[0][1]:
                break  # nor does any box that begins later
            if _common(box, other) is not None:
                return False
    return True


def _common(left: Box, right: Box) -> Box | None:
    box = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(left, right))
    return box if all(start < stop for start, stop in box) else None


def _places(part: Part) -> list[tuple[int, ...]]:
    """Where each box begins in the part's own values."""
    places, along = [], 0
    for box in part.boxes:
        places.append(tuple(along if dim == part.dim else 0 for dim in range(len(box))))
        along += box[part.dim][1] - box[part.dim][0]
    return places


def _within(common: Box, box: Box, place: tuple[int, ...]) -> tuple[slice, ...]:
    """Where `common`, a piece of `box`, lies in values in which `box` begins at `place`."""
    return tuple(
        slice(at + start - first, at + stop - first) for (start, stop), (first, _), at in zip(common, box, place)
    )


def _narrow(box: Box, start: int, stop: int) -> Box:
    """Rows `start` to `stop`, counted within the box."""
    return ((box[0][0] + start, box[0][0] + stop), *box[1:])


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
