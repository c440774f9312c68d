"""What a benchmark asks of a model: how likely texts go on in certain ways. In tokens, in batches without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tandem.data.batch import IGNORE, AskedBatch

Text = tuple[Sequence[int], Sequence[int], Sequence[int]]  # tokens, rows, and a label for each of the rows


class Score(NamedTuple):
    """How a model judges a continuation.

    Attributes:
        log_likelihood: sum of log p of its tokens.
        is_greedy: whether each of them is the most likely one.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Asked:
    """Tokens, and continuations that end with one token more. Choices that differ in their last token share one.

    Attributes:
        tokens: the context, and the continuations without their last token.
        continuations: the tokens whose likelihood is asked, of each continuation.
    """

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> list[int]:
        """After which of the tokens a token of a continuation follows, one continuation after the other."""
        end = len(self.tokens)
        return [row for tokens in self.continuations for row in range(end - len(tokens), end)]

    @property
    def labels(self) -> list[int]:
        return [token for tokens in self.continuations for token in tokens]

    def scores(self, log_probabilities: np.ndarray, most_likely: np.ndarray) -> list[Score]:
        """The scores of the continuations. Both arrays have a number for each of `rows`."""
        ends = np.cumsum([len(tokens) for tokens in self.continuations])
        greedy = most_likely == np.asarray(self.labels)
        parts = zip(np.split(log_probabilities, ends[:-1]), np.split(greedy, ends[:-1]))
        return [Score(float(values.sum()), bool(hits.all())) for values, hits in parts]


def asked_together(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Asked, list[int]]]:
    """Pairs of context and continuation, with those that differ in their last token alone put together.

    Returns:
        Each question, and the numbers of the pairs that it answers, the longest question first: the most memory is
        needed at once, or never.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        groups.setdefault((*context, *continuation[:-1]), []).append(number)
    asked = [
        (Asked(tokens, tuple(tuple(pairs[number][1]) for number in numbers)), numbers)
        for tokens, numbers in groups.items()
    ]
    return sorted(asked, key=lambda one: -len(one[0].tokens))


def in_batches(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive numbers of texts that have at most `most` tokens together; a longer one is alone.

    >>> list(in_batches([5, 3, 2, 1], most=6))
    [range(0, 1), range(1, 4)]
    """
    first, total = 0, 0
    for number, length in enumerate(lengths):
        if number > first and total + length > most:
            yield range(first, number)
            first, total = number, 0
        total += length
    if lengths:
        yield range(first, len(lengths))


def asked_batch(texts: Sequence[Text]) -> AskedBatch:
    """Texts as documents laid end to end."""
    lengths = [len(tokens) for tokens, *_ in texts]
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    return AskedBatch(
        tokens=np.concatenate([np.asarray(tokens, np.int32) for tokens, *_ in texts]),
        labels=np.full(sum(lengths), IGNORE, np.int32),
        position_ids=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=starts,
        rows=np.concatenate([start + np.asarray(rows, np.int64) for start, (_, rows, _) in zip(starts, texts)]),
        row_labels=np.concatenate([np.asarray(labels, np.int32) for *_, labels in texts]),
    )
