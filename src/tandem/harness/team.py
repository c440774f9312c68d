"""How the processes of a job answer together: the first rank leads, and the others follow.

Only the first rank knows the questions. It tells all ranks what comes next; data ranks take different batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.backends.interface import Engine
from tandem.harness.texts import Asked, Score, Text, asked_batch, in_batches
from tandem.launch.world import Communicator
from tandem.parallel.grid import Grid

Found = tuple[list[float], list[int]]  # of each row: log p(label), and the most likely token


@dataclass(frozen=True)
class Team:
    """All processes of a job, each with its share of an engine.

    Attributes:
        tokens_per_batch: how many tokens a data rank computes at once.
        before_batch: called before each batch, at the same time on all ranks. An error in it ends the evaluation.
    """

    engine: Engine
    communicator: Communicator
    grid: Grid
    tokens_per_batch: int
    before_batch: Callable[[], None] = lambda: None

    @property
    def leads(self) -> bool:
        return self.communicator.world.rank == 0

    # --- the first rank

    def score(self, asked: Sequence[Asked]) -> Iterator[list[Score]]:
        """The scores of the continuations of each question, in order."""
        for one, (values, tokens) in zip(asked, self._ask([(one.tokens, one.rows, one.labels) for one in asked])):
            yield one.scores(np.array(values), np.array(tokens))

    def next_tokens(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """The most likely next token of each text."""
        return [tokens[0] for _, tokens in self._ask([(text, [len(text) - 1], [0]) for text in texts])]

    def end(self) -> None:
        """End the `follow` of the other ranks."""
        self._tell([])

    def _ask(self, texts: Sequence[Text]) -> Iterator[Found]:
        batches = list(in_batches([len(tokens) for tokens, *_ in texts], self.tokens_per_batch))
        size = self.grid.data_size
        for first in range(0, len(batches), size):
            shares = [[texts[number] for number in numbers] for numbers in batches[first : first + size]]
            self._tell(shares)
            for found in self._work(shares):
                yield from found

    def _tell(self, shares: list[list[Text]]) -> None:
        self.communicator.all_gather(shares)

    # --- the other ranks

    def follow(self) -> None:
        """Compute what the first rank says, until it ends."""
        while shares := self.communicator.all_gather(None)[0]:
            self._work(shares)

    # --- all ranks

    def _work(self, shares: list[list[Text]]) -> list[list[Found]]:
        """Compute this rank's share. Returns what all data ranks found."""
        self.before_batch()
        place = self.grid.place(self.communicator.world.rank)
        found = self._compute(shares[place.data] if place.data < len(shares) else [])
        everyone: list[Any] = self.communicator.all_gather(found)
        return [everyone[rank] for rank in self.grid.group("data", self.grid.place(0))]

    def _compute(self, texts: list[Text]) -> list[Found]:
        """Collective: also without texts."""
        scores = self.engine.label_scores([asked_batch(texts)] if texts else [])
        if not texts:
            return []
        ((values, tokens),) = scores
        ends = np.cumsum([len(rows) for _, rows, _ in texts])[:-1]
        return [(a.tolist(), b.tolist()) for a, b in zip(np.split(values, ends), np.split(tokens, ends))]
