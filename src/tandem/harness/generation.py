"""Continues prompts up to an end token, a stop text, or a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from tandem.backends.interface import Engine, EngineSettings
from tandem.backends.session import check_layout
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.harness.wishes import Wishes
from tandem.inference.scheduler import MAX_BATCH_SIZE, Request, Scheduler, default_room
from tandem.parallel.grid import Grid

LOOK_BACK = 2  # tokens by which a stop's letters may be cut otherwise than the stop alone

Prompt = tuple[Sequence[int], Wishes]  # tokens, and how the answer is generated


@dataclass(frozen=True)
class Ends:
    """Where an answer ends.

    Attributes:
        ids: tokens that end it, and do not belong to it.
    """

    tokenizer: Tokenizer
    ids: Collection[int]

    def stops(self, answer: Sequence[int], wishes: Wishes) -> bool:
        """Whether the answer's last token completes one of its stop texts."""
        return any(stop in self._tail(answer, stop) for stop in wishes.stops if stop)

    def _tail(self, answer: Sequence[int], stop: str) -> str:
        """The end of an answer in which a stop would stand that has just become whole."""
        return self.tokenizer.decode(answer[-(len(self.tokenizer.encode(stop)) + LOOK_BACK) :])


def has_sessions(grid: Grid, settings: EngineSettings) -> bool:
    """Whether engines with these settings keep keys and values."""
    try:
        check_layout(grid, settings)
    except UserError:
        return False
    return True


def with_session(engine: Engine, prompts: Sequence[Prompt], ends: Ends) -> list[list[int]]:
    """The answers to some prompts. The ranks that share them call this together; one of them gets the answers."""

    def stop_at(wishes: Wishes) -> Callable[[Request], None]:
        def look(request: Request) -> None:
            if request.tokens and ends.stops(request.tokens, wishes):
                request.stop()

        return look

    with Scheduler(engine, room=room_for(engine, prompts)) as scheduler:
        if not scheduler.leads:
            scheduler.follow()
            return []
        requests = [
            scheduler.submit(tokens, wishes.sampling, ends.ids, on_token=stop_at(wishes)) for tokens, wishes in prompts
        ]
        scheduler.run()
    return [request.tokens for request in requests]


def room_for(engine: Engine, prompts: Sequence[Prompt]) -> int:
    """How many tokens a scheduler keeps for these prompts, at most."""
    texts = min(len(prompts), MAX_BATCH_SIZE)
    longest = max(len(tokens) + wishes.sampling.max_new_tokens for tokens, wishes in prompts)
    return max(longest, min(texts * longest, default_room(engine, texts)))


@dataclass(eq=False)
class _Begun:
    number: int
    prompt: Sequence[int]
    wishes: Wishes
    answer: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *self.answer]


def compute_again(
    next_tokens: Callable[[Sequence[Sequence[int]]], list[int]], prompts: Sequence[Prompt], ends: Ends, most_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Answer prompts in layouts without sessions: each token computes the whole sequence again.

    Args:
        next_tokens: the most likely next token of each text.
        most_tokens: how many tokens are computed together.

    Yields:
        The number of a prompt with its answer, when that ends.

    Raises:
        UserError: an answer shall be random.
    """
    if any(wishes.is_random for _, wishes in prompts):
        raise UserError("a task samples its answers, which this layout cannot do")
    waiting = [_Begun(number, tokens, wishes) for number, (tokens, wishes) in enumerate(prompts)]
    running: list[_Begun] = []
    while waiting or running:
        while waiting and (not running or sum(len(one.text) for one in [*running, waiting[0]]) <= most_tokens):
            running.append(waiting.pop(0))
        ended = []
        for begun, token in zip(running, next_tokens([begun.text for begun in running])):
            if token in ends.ids:
                ended.append(begun)
                continue
            begun.answer.append(token)
            is_full = len(begun.answer) == begun.wishes.sampling.max_new_tokens
            if is_full or ends.stops(begun.answer, begun.wishes):
                ended.append(begun)
        running = [begun for begun in running if begun not in ended]
        yield from ((begun.number, begun.answer) for begun in ended)
