"""The tokens of many conversations: their labels, cutting long ones, and leaving some out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.templates.messages import Turn
from tandem.data.templates.truncation import TurnLengths, header_length, kept_tokens


class Conversations:
    """The tokens of many conversations, end to end.

    Attributes:
        ids, labels: int32 [t]; the labels of sources are IGNORE.
        lengths: int64 [conversations], number of tokens of each.
    """

    def __init__(self, documents: Sequence[Sequence[Turn]], ids: np.ndarray, piece_lengths: np.ndarray) -> None:
        turns = [turn for turns in documents for turn in turns]
        self._turns_of = np.array([len(turns) for turns in documents], np.int64)
        sides = [len(side) for turn in turns for side in (turn.source, turn.target)]
        # Tokens of each turn's source and target, int64 [turns, 2].
        self._sides = sums(piece_lengths, np.array(sides, np.int64)).reshape(-1, 2)
        self.ids = ids
        is_target = np.tile(np.array([False, True]), len(turns))
        self.labels = np.where(np.repeat(is_target, self._sides.ravel()), ids, np.int32(IGNORE))
        self.lengths = sums(self._sides.sum(axis=1), self._turns_of)

    def trim(self, room: int, header: Sequence[int]) -> tuple[int, int]:
        """Cut conversations of more than `room` tokens, turn by turn.

        Args:
            header: the ids with which the header of an answer begins.

        Returns:
            How many conversations were cut, and in how many of them a prompt was cut whose answer is kept.
        """
        long = np.flatnonzero(self.lengths > room)
        if not len(long):
            return 0, 0
        cut_prompts = 0
        keep = np.ones(len(self.ids), bool)
        first_turns, starts = (np.cumsum(counts) - counts for counts in (self._turns_of, self.lengths))
        for conversation in long.tolist():
            first, begin = int(first_turns[conversation]), int(starts[conversation])
            turns, place = [], begin
            for source, target in self._sides[first : first + int(self._turns_of[conversation])].tolist():
                turns.append(TurnLengths(source, target, header_length(self.ids[place : place + source], header)))
                place += source + target
            keep[begin:place], cuts_prompt = kept_tokens(turns, room)
            cut_prompts += cuts_prompt
        self.lengths = sums(keep, self.lengths)
        self.ids, self.labels = self.ids[keep], self.labels[keep]
        return len(long), cut_prompts

    def drop_untrained(self) -> int:
        """Leave out conversations without a trained token. Returns how many there were."""
        trained = self.trained() > 0
        self.keep_only(trained)
        return int(np.count_nonzero(~trained))

    def keep_only(self, chosen: np.ndarray) -> None:
        """Keep only the `chosen` conversations, bool [conversations]."""
        if not chosen.all():
            self.ids, self.labels, self.lengths = self._part(chosen)

    def every(self, step: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids, labels and lengths of the conversations `first`, `first + step`, .."""
        return self._part(np.arange(len(self.lengths)) % step == first)

    def trained(self) -> np.ndarray:
        """How many tokens of each conversation are trained, int64 [conversations]."""
        return sums(self.labels != IGNORE, self.lengths)

    def _part(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keep = np.repeat(chosen, self.lengths)
        return self.ids[keep], self.labels[keep], self.lengths[chosen]


def sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [groups]: the sum of each group of `values`. The groups follow each other and have `counts` entries.

    >>> sums(np.array([1, 2, 3, 4]), counts=np.array([1, 3]))
    array([1, 9])
    """
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(counts)
    return totals[ends] - totals[ends - counts]


def with_ends(tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and lengths with `end` added `counts` times (int or bool [sequences]) after each sequence.

    >>> with_ends(np.array([5, 6, 7]), np.array([2, 1]), np.array([1, 0]), end=0)
    (array([5, 6, 0, 7]), array([3, 1]))
    """
    return np.insert(tokens, np.repeat(np.cumsum(lengths), counts), end), lengths + counts
