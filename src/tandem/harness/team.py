"""How the processes of a job answer together: the first rank leads, and the others follow.

Only the first rank knows the questions. It tells all ranks what comes next. Data ranks score different texts, and
copies of the model answer different prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.backends.interface import Engine
from tandem.harness.generation import Ends, Prompt, compute_again, room_for, with_session
from tandem.harness.texts import Asked, Score, Text, asked_batch, in_batches
from tandem.harness.wishes import Wishes
from tandem.inference.room import memory_notice
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import MAX_BATCH_SIZE
from tandem.launch.world import Communicator
from tandem.logs import log
from tandem.parallel.grid import Grid

Found = tuple[list[float], list[int]]  # of each row: log p(label), and the most likely token

SCORE, ANSWER, END = "score", "answer", "end"
ROUND = 2 * MAX_BATCH_SIZE  # prompts of a copy of the model that are answered before the next are given out


@dataclass(frozen=True)
class Team:
    """All processes of a job, each with its share of an engine.

    Attributes:
        ends: where answers end.
        has_sessions: whether the engine keeps keys and values in this layout.
        tokens_per_batch: how many tokens a data rank computes at once.
        before_batch: called before each batch, at the same time on all ranks. An error in it ends the evaluation.
    """

    engine: Engine
    communicator: Communicator
    grid: Grid
    ends: Ends
    has_sessions: bool
    tokens_per_batch: int
    before_batch: Callable[[], None] = lambda: None

    # --- the first rank

    def score(self, asked: Sequence[Asked]) -> Iterator[list[Score]]:
        """The scores of the continuations of each question, in order."""
        for one, (values, tokens) in zip(asked, self._ask([(one.tokens, one.rows, one.labels) for one in asked])):
            yield one.scores(np.array(values), np.array(tokens))

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """Answer the prompts. Yields the number of a prompt with its answer, when that is there."""
        if not self.has_sessions:
            most_tokens = self.tokens_per_batch * self.grid.data_size
            yield from compute_again(self._next_tokens, prompts, self.ends, most_tokens)
            return
        if prompts:
            room = room_for(self.engine, prompts)
            log.info("> %s", memory_notice(self.engine, room, f"{room:,} tokens"))
        size = self.grid.copies_of_the_model
        for first in range(0, len(prompts), ROUND * size):
            numbers = range(first, min(first + ROUND * size, len(prompts)))
            shares = [numbers[rank::size] for rank in range(min(size, len(numbers)))]
            texts = [[(prompts[number][0], *prompts[number][1].plain) for number in share] for share in shares]
            for share, answers in zip(shares, self._do(ANSWER, texts)):
                yield from zip(share, answers, strict=True)

    def end(self) -> None:
        """End the `follow` of the other ranks."""
        self._tell(END)

    def _ask(self, texts: Sequence[Text]) -> Iterator[Found]:
        batches = list(in_batches([len(tokens) for tokens, *_ in texts], self.tokens_per_batch))
        size = self.grid.data_size
        for first in range(0, len(batches), size):
            shares = [[texts[number] for number in numbers] for numbers in batches[first : first + size]]
            for found in self._do(SCORE, shares):
                yield from found

    def _next_tokens(self, texts: Sequence[Sequence[int]]) -> list[int]:
        return [tokens[0] for _, tokens in self._ask([(text, [len(text) - 1], [0]) for text in texts])]

    def _do(self, what: str, shares: list[Any]) -> list[Any]:
        """Have each data rank, or each copy of the model, work on its share. Returns what they found, in that order."""
        self._tell(what, shares)
        return self._work(what, shares)[: len(shares)]

    def _tell(self, what: str, shares: list[Any] | None = None) -> None:
        self.communicator.all_gather([what, shares])

    # --- the other ranks

    def follow(self) -> None:
        """Compute what the first rank says, until it ends."""
        while True:
            what, shares = self.communicator.all_gather(None)[0]
            if what == END:
                return
            self._work(what, shares)

    # --- all ranks

    def _work(self, what: str, shares: list[Any]) -> list[Any]:
        """Work on this rank's share. Returns what all data ranks, or all copies of the model, found."""
        self.before_batch()
        place = self.grid.place(self.communicator.world.rank)
        if what == SCORE:
            own, first_ranks = place.data, self.grid.group("data", self.grid.place(0))
        else:
            own = self.grid.copy(place)
            first_ranks = [self.grid.model(copy)[0] for copy in range(self.grid.copies_of_the_model)]
        mine = shares[own] if own < len(shares) else []
        found = self._scores_of(mine) if what == SCORE else self._answers_to(mine)
        everyone = self.communicator.all_gather(found)
        return [everyone[rank] for rank in first_ranks]

    def _scores_of(self, texts: list[Text]) -> list[Found]:
        """Collective: also without texts."""
        scores = self.engine.label_scores([asked_batch(texts)] if texts else [])
        if not texts:
            return []
        ((values, tokens),) = scores
        ends = np.cumsum([len(rows) for _, rows, _ in texts])[:-1]
        return [(a.tolist(), b.tolist()) for a, b in zip(np.split(values, ends), np.split(tokens, ends))]

    def _answers_to(self, texts: list[Any]) -> list[list[int]]:
        """Copies of the model answer for themselves: without prompts there is nothing to do."""
        prompts = [(tokens, Wishes(Sampling(**sampling), tuple(stops))) for tokens, sampling, stops in texts]
        return with_session(self.engine, prompts, self.ends) if prompts else []
