"""Answers to many prompts, in order, while others are still written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from tandem.backends.interface import Engine
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.inference.room import memory_notice, tokens_that_fit
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import MAX_BATCH_SIZE, Request, Scheduler
from tandem.inference.text import StopStrings, TokenText

SHARE_OF_MEMORY = 0.8  # of what is free, for keys and values at most


@dataclass(frozen=True)
class Question:
    """A prompt, and how to answer it.

    Attributes:
        stop: texts that end the answer, and are not a part of it.
    """

    tokens: Sequence[int]
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        token_ids: all that were chosen, except the end token.
        finish_reason: "stop" or "length".
    """

    text: str
    token_ids: list[int]
    finish_reason: str


def replies(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    stop_ids: Collection[int],
    *,
    batch_size: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_text: Callable[[int, str], None] = lambda number, text: None,
) -> Iterator[Reply]:
    """The answers, in the order of the questions. Ranks that do not lead compute, and yield nothing.

    Args:
        batch_size: how many are written at the same time.
        say: called with a notice about memory, before it is allocated.
        on_text: called with the number of a question and the next piece of its answer, for one question after the
            other: a later one waits until those before it are written.

    Raises:
        UserError: a prompt cannot be answered, or there is not enough memory.
    """
    if not questions:
        return
    size = min(MAX_BATCH_SIZE if batch_size is None else batch_size, len(questions))
    room = room_for(engine, questions, size)
    say(memory_notice(engine, room, f"{room:,} tokens"))
    with Scheduler(engine, size, room) as scheduler:
        if not scheduler.leads:
            scheduler.follow()
            return
        for number, question in enumerate(questions, 1):
            try:
                scheduler.check(question.tokens, question.sampling)
            except UserError as error:
                raise UserError(f"prompt {number} of {len(questions)}: {error}") from None
        ahead = deque[_Written]()
        told, submitted = 0, 0
        for number in range(len(questions)):
            while submitted < len(questions) and len(ahead) < 2 * size:
                ahead.append(_Written(scheduler, tokenizer, questions[submitted], stop_ids))
                submitted += 1
            written = ahead[0]
            while not written.is_done:
                scheduler.step()
                told = _tell(written, number, told, on_text)
            _tell(written, number, told, on_text)
            told = 0
            yield ahead.popleft().reply()


def room_for(engine: Engine, questions: Sequence[Question], size: int) -> int:
    """Tokens to keep for the `size` longest questions with their answers, or fewer where memory is short."""
    most = engine.config.max_position_embeddings
    lengths = [min(len(question.tokens) + question.sampling.max_new_tokens, most) for question in questions]
    longest = sorted(lengths, reverse=True)[:size]
    return max(longest[0], min(sum(longest), tokens_that_fit(engine, SHARE_OF_MEMORY)))


def _tell(written: _Written, number: int, told: int, on_text: Callable[[int, str], None]) -> int:
    if new := written.text[told:]:
        on_text(number, new)
    return len(written.text)


class _Written:
    """A request and the text of its answer so far."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, question: Question, stop_ids: Collection[int]
    ) -> None:
        self.text = ""
        self._decoded, self._stop = TokenText(tokenizer), StopStrings(question.stop)
        self._read = 0  # tokens
        self._request = scheduler.submit(
            question.tokens, question.sampling, stop_ids, on_token=self._on_token, logprobs=False
        )

    @property
    def is_done(self) -> bool:
        return self._request.finish_reason is not None

    def reply(self) -> Reply:
        assert self._request.finish_reason is not None
        return Reply(self.text, self._request.tokens, self._request.finish_reason)

    def _on_token(self, request: Request) -> None:
        for token in request.tokens[self._read :]:
            self.text += self._stop.feed(self._decoded.feed(token))
        self._read = len(request.tokens)
        if self._stop.found is not None:
            request.finish_reason = "stop"
        elif request.finish_reason is not None:
            self.text += self._stop.feed(self._decoded.end()) + self._stop.end()
            if self._stop.found is not None:
                request.finish_reason = "stop"
