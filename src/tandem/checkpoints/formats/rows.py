"""Parts of global tensors, in blocks of rows, from the slices of them that files hold.

A file records one checksum for a whole slice. Rows are read in order, so it is known when the last block has come, and
no more than a block is in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np

from tandem.checkpoints.formats.arrays import row_blocks
from tandem.parallel.slices import Part, transfer


class Rows(Protocol):
    """A stored array, read from its first row to its last."""

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last`. To ask for earlier rows than the last time is right, and slow."""
        ...

    def close(self) -> None:
        """Read what was not asked for, if a checksum needs it.

        Raises:
            UserError: the checksum differs.
        """
        ...


class CheckedRows(ABC):
    """Rows of an array that has a checksum: those that are passed over are read, too.

    Args:
        shape, dtype: of the array.
        is_checked: whether there is a checksum. Without one, nothing is read but what is asked for.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, *, is_checked: bool = True) -> None:
        self._shape, self._dtype, self._is_checked = shape, dtype, is_checked
        self._next = 0  # the first row that is not in the checksum

    def read(self, first: int, last: int) -> np.ndarray:
        if not self._is_checked:
            return self._load(first, last)
        if first < self._next:
            self._next = 0
            self._begin()
        self._pass_over(first)
        return self._take(last)

    def close(self) -> None:
        if self._is_checked:
            self._pass_over(self._shape[0])
            self._check()

    def _pass_over(self, stop: int) -> None:
        start = self._next
        for _, last in row_blocks((stop - start, *self._shape[1:]), self._dtype):
            self._take(start + last)

    def _take(self, last: int) -> np.ndarray:
        rows = self._load(self._next, last)
        self._add(rows.reshape(-1).view(np.uint8).data)
        self._next = last
        return rows

    @abstractmethod
    def _load(self, first: int, last: int) -> np.ndarray:
        """Rows of the file, contiguous, in new memory."""

    @abstractmethod
    def _begin(self) -> None:
        """Forget what was added to the checksum."""

    @abstractmethod
    def _add(self, data: memoryview) -> None:
        """Add the next bytes to the checksum."""

    @abstractmethod
    def _check(self) -> None:
        """Raise UserError unless the checksum is what the file records."""


class WholeRows:
    """Rows of an array in memory."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def read(self, first: int, last: int) -> np.ndarray:
        return self._array[first:last]

    def close(self) -> None:
        """It was checked when it was read."""


@dataclass(frozen=True)
class StoredSlice:
    """A part of a global tensor, and its rows in a file."""

    part: Part
    rows: Rows


def blocks(part: Part, dtype: np.dtype, slices: Sequence[StoredSlice]) -> Iterator[np.ndarray]:
    """`part` of a global tensor, in blocks of consecutive rows. What no slice has is zero.

    Raises:
        UserError: a slice is damaged. This may be known after the last block only.
    """
    places = _Places(slices)
    for first, last in row_blocks(part.shape, dtype):
        yield _block(part.rows(first, last), dtype, places)
    for stored in slices:
        stored.rows.close()


def joined(rows: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array of `shape` that consecutive blocks of rows make up."""
    values, first = np.empty(shape, dtype), 0
    for block in rows:
        values[first : first + len(block)] = block
        first += len(block)
    return values


def of_rows(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Consecutive blocks of rows, cut and joined to arrays of `size` rows.

    >>> [rows.tolist() for rows in of_rows([np.array([1, 2, 3]), np.array([4])], 2)]
    [[1, 2], [3, 4]]
    """
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        while sum(map(len, waiting)) >= size:
            together = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield together[:size]
            waiting = [together[size:]] if len(together) > size else []


def _block(wanted: Part, dtype: np.dtype, places: _Places) -> np.ndarray:
    ranges = dict.fromkeys(box[0] for box in wanted.boxes)
    found = [place.read(start, stop) for start, stop in ranges for place in places.near(start, stop)]
    if len(found) == 1 and found[0][0].boxes == wanted.boxes:  # as most blocks: nothing is put together
        return found[0][1]
    values = np.zeros(wanted.shape, dtype)
    for piece, rows in found:
        transfer(rows, piece, values, wanted)
    return values


@dataclass(frozen=True)
class _Place:
    """Consecutive rows of a slice that are consecutive in the global tensor, too; `first` counts within the slice."""

    part: Part
    first: int
    rows: Rows

    @property
    def start(self) -> int:
        return self.part.boxes[0][0][0]

    @property
    def stop(self) -> int:
        return self.part.boxes[0][0][1]

    def read(self, start: int, stop: int) -> tuple[Part, np.ndarray]:
        """What it has of rows `start` to `stop` of the global tensor: which part, and its numbers."""
        low, high = max(start, self.start) - self.start, min(stop, self.stop) - self.start
        return self.part.rows(low, high), self.rows.read(self.first + low, self.first + high)


class _Places:
    """Where rows of a global tensor are. There may be hundreds of places: two for each expert."""

    def __init__(self, slices: Sequence[StoredSlice]) -> None:
        self._places = sorted((place for stored in slices for place in _places(stored)), key=lambda place: place.start)
        self._starts = [place.start for place in self._places]
        self._stops = list(accumulate((place.stop for place in self._places), max))

    def near(self, start: int, stop: int) -> list[_Place]:
        """The places that have any of rows `start` to `stop`."""
        found = self._places[bisect_right(self._stops, start) : bisect_left(self._starts, stop)]
        return [place for place in found if place.stop > start]


def _places(stored: StoredSlice) -> Iterator[_Place]:
    if stored.part.dim != 0:
        yield _Place(stored.part, 0, stored.rows)
        return
    first = 0
    for box in stored.part.boxes:
        yield _Place(Part((box,)), first, stored.rows)
        first += box[0][1] - box[0][0]
