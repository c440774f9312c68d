"""Continues prompts up to an end token, a stop text, or a number of tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.harness.team import Team
from tandem.harness.wishes import Wishes

LOOK_BACK = 2  # tokens by which a stop's letters may be cut otherwise than the stop alone


@dataclass
class Begun:
    """A prompt and the tokens of its answer so far. An end token is the last one."""

    number: int
    prompt: Sequence[int]
    wishes: Wishes
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Ends:
    """When an answer ends."""

    tokenizer: Tokenizer
    ids: Collection[int]

    def ended(self, begun: Begun) -> bool:
        answer, wishes = begun.answer, begun.wishes
        if answer[-1] in self.ids or len(answer) >= wishes.sampling.max_new_tokens:
            return True
        return any(stop in self._tail(answer, stop) for stop in wishes.stops if stop)

    def _tail(self, answer: Sequence[int], stop: str) -> str:
        """The end of an answer in which a stop would stand that has just become whole."""
        return self.tokenizer.decode(answer[-(len(self.tokenizer.encode(stop)) + LOOK_BACK) :])


def generate(
    team: Team, prompts: Sequence[tuple[Sequence[int], Wishes]], ends: Ends
) -> Iterator[tuple[int, list[int]]]:
    """Continue each prompt with the likeliest tokens. Yields the number of a prompt with its answer, when it ends.

    Sequences are computed whole for each token, so this works in any layout.

    Raises:
        UserError: a task wants random answers.
    """
    waiting = [Begun(number, tokens, wishes) for number, (tokens, wishes) in enumerate(prompts)]
    if any(begun.wishes.is_random for begun in waiting):
        raise UserError("a task samples its answers: that needs one process, or tensor ranks only")
    running: list[Begun] = []
    most_tokens = team.tokens_per_batch * team.grid.data_size
    while waiting or running:
        while waiting and (not running or _tokens([*running, waiting[0]]) <= most_tokens):
            running.append(waiting.pop(0))
        for begun, token in zip(running, team.next_tokens([[*begun.prompt, *begun.answer] for begun in running])):
            begun.answer.append(token)
        ended = [begun for begun in running if ends.ended(begun)]
        running = [begun for begun in running if begun not in ended]
        yield from ((begun.number, begun.answer) for begun in ended)


def _tokens(running: Sequence[Begun]) -> int:
    return sum(len(begun.prompt) + len(begun.answer) for begun in running)
