"""What prompts have in common is computed once: a new sequence begins with a copy of another's keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tandem.backends.interface import Session

LEAST = 16  # tokens that are worth a copy


@dataclass(frozen=True)
class Known:
    """A sequence of a session: the tokens that it has, and the room for them."""

    sequence: int
    tokens: Sequence[int]
    room: int


class Ended:
    """Sequences of requests that have ended. They stay until their memory is needed, the newest longest.

    Args:
        most: how many stay.
    """

    def __init__(self, session: Session, most: int) -> None:
        self._session, self._most = session, most
        self._kept: dict[int, Known] = {}

    def __iter__(self) -> Iterator[Known]:
        return iter(self._kept.values())

    def add(self, known: Known) -> None:
        self._kept[known.sequence] = known
        if len(self._kept) > self._most:
            self._end(next(iter(self._kept)))

    def free(self, source: Known | None = None) -> int:
        """How many tokens a new sequence could have, or one that begins as `source`."""
        return self._session.free if source is None else self._session.free_next_to(source.sequence)

    def place(self, room: int, source: Known | None, common: int) -> tuple[int, int] | None:
        """A new sequence with the first `common` tokens of `source`, or with none.

        Returns:
            Its number, and how many tokens it has; None when there is no room for it, whatever is given up.
        """
        self._free(room, but=source)
        if room <= self.free(source):
            if source is None:
                return self._session.begin(room), 0
            self._touch(source)
            return self._session.copy(source.sequence, room, common), common
        if source is None or source.sequence not in self._kept:
            return None
        if source.room >= room:  # no room for both: it becomes the new one
            del self._kept[source.sequence]
            self._session.rewind(source.sequence, common)
            return source.sequence, common
        self._end(source.sequence)
        return (self._session.begin(room), 0) if room <= self._session.free else None

    def _free(self, room: int, but: Known | None) -> None:
        for sequence in list(self._kept):
            if room <= self.free(but):
                return
            if but is None or sequence != but.sequence:
                self._end(sequence)

    def _touch(self, known: Known) -> None:
        """Let it count as the newest."""
        if (kept := self._kept.pop(known.sequence, None)) is not None:
            self._kept[known.sequence] = kept

    def _end(self, sequence: int) -> None:
        del self._kept[sequence]
        self._session.end(sequence)


def common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two texts share.

    >>> common_beginning([1, 2, 3], [1, 2, 4])
    2
    """
    pairs = enumerate(zip(left, right))
    return next((number for number, (a, b) in pairs if a != b), min(len(left), len(right)))
