"""Many requests to one engine at once: each step computes one more token of everything that runs.

Requests join and leave while others run (continuous batching: "Orca", OSDI 2022). What a request gets does not depend
on the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import numpy as np

from tandem.backends.interface import Engine, Piece, Session
from tandem.errors import UserError
from tandem.inference.beginnings import LEAST, Ended, Known, common_beginning
from tandem.inference.room import memory_notice, tokens_that_fit
from tandem.inference.sampling import Chooser, Sampling, log_probabilities, most_likely

FinishReason = Literal["stop", "length", "cancelled"]
Top = list[tuple[int, float]]  # token ids with their log-probabilities, the most likely first

MAX_BATCH_SIZE = 16
# New tokens of prompts in one step; longer prompts take several steps, so that others need not wait for them.
PROMPT_TOKENS = 2048
SHARE_OF_MEMORY = 0.5  # of what is free, for keys and values, when nobody says how much they need


@dataclass(eq=False)
class Request:
    """One text to continue.

    Attributes:
        tokens: the answer so far, without the token that ended it.
        logprobs: of the answer's tokens, as the model gives them, before temperature and penalties; empty unless asked
            for.
        top: of each of the answer's tokens, the most likely ones in its place; empty unless asked for.
        prompt_logprobs: of the prompt's tokens, None for the first; empty unless asked for.
        prompt_top: the same as `top` for the prompt, None for the first.
        shared_tokens: how many of the prompt's tokens were not computed, since another text began with them, too.
        finish_reason: None while it waits or runs. "stop": an end token, or `stop` was called.
        end_token: the end token that the model chose; None if it chose none.
    """

    prompt: Sequence[int]
    sampling: Sampling
    stop_ids: Collection[int] = ()
    wants_logprobs: bool = True
    on_token: Callable[[Request], None] | None = None
    top_logprobs: int = 0
    wants_prompt_logprobs: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top: list[Top | None] = field(default_factory=list)
    shared_tokens: int = 0
    finish_reason: FinishReason | None = None
    end_token: int | None = None

    def stop(self) -> None:
        """End the answer here, with the reason "stop". `on_token` may call it."""
        if self.finish_reason is None:
            self.finish_reason = "stop"


class _Running:
    """A request with its place in the session.

    Attributes:
        most_tokens: in its answer.
        room: how many tokens the sequence can have.
        ready: how many of the prompt's tokens are computed.
        computed: how many tokens the sequence has, with those of the answer.
    """

    def __init__(self, request: Request, sequence: int, room: int, most_tokens: int, ready: int) -> None:
        self.request, self.sequence, self.room, self.most_tokens = request, sequence, room, most_tokens
        self.ready = self.computed = ready
        self._choose = Chooser(request.sampling, request.prompt)

    @property
    def known(self) -> Known:
        request = self.request
        return Known(self.sequence, [*request.prompt, *request.tokens][: self.computed], self.room)

    def piece(self, most_prompt_tokens: int) -> Piece | None:
        """What to compute next; None where there is no room in the step."""
        request, prompt = self.request, self.request.prompt
        if self.ready == len(prompt):
            return Piece(self.sequence, request.tokens[-1:], [0])
        tokens = prompt[self.ready : self.ready + most_prompt_tokens]
        if not tokens:
            return None
        if request.wants_prompt_logprobs:
            return Piece(self.sequence, tokens, range(len(tokens)))
        return Piece(self.sequence, tokens, [len(tokens) - 1] if self.ready + len(tokens) == len(prompt) else [])

    def take(self, piece: Piece, rows: Iterator[np.ndarray]) -> None:
        """Use the logits of a piece: score the prompt, and choose the next token."""
        prompt = self.request.prompt
        for row in piece.rows:
            logits, next_position = next(rows), self.ready + row + 1
            if next_position < len(prompt):
                self._score(prompt[next_position], logits)
            else:
                self._append(logits)
        self.ready = min(self.ready + len(piece.tokens), len(prompt))
        self.computed += len(piece.tokens)

    def _score(self, token: int, logits: np.ndarray) -> None:
        request, scores = self.request, log_probabilities(logits)
        request.prompt_logprobs.append(float(scores[token]))
        if request.top_logprobs:
            request.prompt_top.append(most_likely(scores, request.top_logprobs))

    def _append(self, logits: np.ndarray) -> None:
        request = self.request
        if self.most_tokens:
            token = self._choose(logits)
            if token in request.stop_ids:
                request.end_token, request.finish_reason = token, "stop"
                return
            request.tokens.append(token)
            if request.wants_logprobs:
                scores = log_probabilities(logits)
                request.logprobs.append(float(scores[token]))
                if request.top_logprobs:
                    request.top.append(most_likely(scores, request.top_logprobs))
        if len(request.tokens) == self.most_tokens:
            request.finish_reason = "length"


class Scheduler:
    """Continues requests on one engine. Use it as a context, which ends the engine's session.

    What a prompt has in common with another one, or with a text that was written before, is not computed again.

    Of the ranks that hold a copy of the model together, the first leads; the others only call `follow`. It is not safe
    for several threads: one thread calls all methods.

    Args:
        max_batch_size: how many requests run at the same time; default: 16. Others wait.
        room: how many tokens of all that run together can be kept; default: `default_room`.
        other: of another model on the same ranks. Those that do not lead follow both, by following one of them.

    Raises:
        UserError: see `Engine.session`.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch_size: int | None = None,
        room: int | None = None,
        other: Scheduler | None = None,
    ) -> None:
        self.engine = engine
        self.max_batch_size = MAX_BATCH_SIZE if max_batch_size is None else max_batch_size
        room = default_room(engine, self.max_batch_size) if room is None else room
        self._session: Session = engine.session(room, None if other is None else other._session)
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._ended = Ended(self._session, self.max_batch_size)
        self._in_step = False

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session. What still waits or runs is cancelled."""
        for request in [*self._waiting, *(running.request for running in self._running)]:
            if request.finish_reason is None:
                request.finish_reason = "cancelled"
        self._waiting.clear()
        self._running.clear()
        self._session.close()

    @property
    def leads(self) -> bool:
        return self._session.leads

    def follow(self) -> None:
        """On ranks that do not lead: compute what the first one asks for, until it closes its scheduler."""
        self._session.follow()

    @property
    def notice(self) -> str:
        """How much memory the keys and values may take."""
        room = self._session.room
        return memory_notice(self.engine, room, f"{room:,} tokens, {self.max_batch_size} texts")

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        stop_ids: Collection[int],
        *,
        on_token: Callable[[Request], None] | None = None,
        logprobs: bool = True,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
    ) -> Request:
        """Add a request. It runs as soon as `step` finds a place for it.

        Args:
            stop_ids: tokens that end the answer.
            on_token: called after each new token, and when the request ends without one.
            logprobs: whether to keep the log-probabilities of the answer's tokens. With a large vocabulary they take a
                few percent of the time.
            top_logprobs: of how many other tokens log-probabilities are kept with them, in each place.
            prompt_logprobs: whether to keep the prompt's log-probabilities. To score a text without continuing it, also
                give a sampling with 0 new tokens.

        Raises:
            UserError: the prompt is empty, too long, or has a token that the model does not know.
        """
        self.check(prompt, sampling)
        request = Request(list(prompt), sampling, stop_ids, logprobs, on_token, top_logprobs, prompt_logprobs)
        if prompt_logprobs:
            request.prompt_logprobs.append(None)
            if top_logprobs:
                request.prompt_top.append(None)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request that waits or runs. What it has so far stays."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
        if not self._in_step:
            self._retire()

    def step(self) -> bool:
        """Compute one more token of each request that runs; prompts are computed first. False when nothing is left."""
        self._in_step = True
        try:
            self._step()
        finally:
            self._in_step = False
        self._retire()
        return bool(self._running or self._waiting)

    def _step(self) -> None:
        self._retire()
        self._admit()
        budget, work = PROMPT_TOKENS, list[tuple[_Running, Piece]]()
        for running in self._running:
            piece = running.piece(budget)
            if piece is not None:
                work.append((running, piece))
                budget -= len(piece.tokens) if running.ready < len(running.request.prompt) else 0
        if work:
            rows = self._session.step([piece for _, piece in work])
            for running, piece in work:
                running.take(piece, rows)
            for running, _ in work:
                request = running.request
                if request.on_token is not None and running.ready == len(request.prompt):
                    request.on_token(request)

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raise UserError when a prompt is empty, too long, or has a token that the model does not know."""
        config, length = self.engine.config, len(prompt)
        most = min(config.max_position_embeddings, self._session.room)
        if not length:
            raise UserError("the prompt is empty: it has no tokens")
        if length + min(1, sampling.max_new_tokens) > most:
            limit = "max_position_embeddings" if most == config.max_position_embeddings else "the memory for keys"
            raise UserError(f"the prompt has {length:,} tokens; {limit} allows {most:,} together with the answer")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise UserError(
                f"the prompt has the token id {wrong}, and the model has {config.vocab_size} rows in its embedding: "
                f"the tokenizer is another model's, or `tandem convert --resize-vocab` must add rows"
            )

    def _most_tokens(self, request: Request) -> int:
        """How long the answer may become."""
        most = min(self.engine.config.max_position_embeddings, self._session.room)
        return min(request.sampling.max_new_tokens, most - len(request.prompt))

    def _admit(self) -> None:
        """Begin requests, in their order. Those that wait for a common beginning let others pass."""
        held = list[Request]()
        while self._waiting and len(self._running) < self.max_batch_size:
            request = self._waiting.popleft()
            if self._is_being_read(request):
                held.append(request)
            elif not self._begin(request):
                held.append(request)
                break
        self._waiting.extendleft(reversed(held))

    def _begin(self, request: Request) -> bool:
        """Give a request a sequence. False where there is no room."""
        room = self._room(request)
        placed = self._ended.place(room, *self._longest_beginning(request))
        if placed is None:
            return False
        sequence, ready = placed
        request.shared_tokens = ready
        self._running.append(_Running(request, sequence, room, self._most_tokens(request), ready))
        return True

    def _room(self, request: Request) -> int:
        """Tokens of the prompt and the answer; the last one is chosen, and not computed."""
        return len(request.prompt) + max(0, self._most_tokens(request) - 1)

    def _longest_beginning(self, request: Request) -> tuple[Known | None, int]:
        """What is known that begins as a prompt does, and how much of it; the prompt's last token is always computed.

        None where that is too little, or where the request wants to know the log-probabilities of the prompt's tokens.
        Ranks that share experts stay about equally busy: a copy is where its source is.
        """
        if request.wants_prompt_logprobs:
            return None, 0
        prompt, idle = request.prompt[:-1], self._ended.free() - self._room(request)
        (common, _), best = max(
            (
                ((common_beginning(prompt, known.tokens), free), known)
                for known in self._all_known()
                if (free := self._ended.free(known)) >= idle
            ),
            key=lambda found: found[0],
            default=((0, 0), None),
        )
        return (best, common) if common >= LEAST else (None, 0)

    def _all_known(self) -> Iterator[Known]:
        """Those that stay anyway come first."""
        yield from (running.known for running in self._running)
        yield from self._ended

    def _is_being_read(self, request: Request) -> bool:
        """Whether a prompt that is being computed begins as this one does, for longer than what is known so far."""
        reading = [running.request.prompt for running in self._running if running.ready < len(running.request.prompt)]
        if request.wants_prompt_logprobs or not reading:
            return False
        mine = request.prompt[:-1]
        coming = max(common_beginning(mine, prompt) for prompt in reading)
        return coming >= LEAST + self._longest_beginning(request)[1]

    def _retire(self) -> None:
        """Free the places of requests that have ended. What is known of them stays while there is room."""
        for running in [running for running in self._running if running.request.finish_reason is not None]:
            self._ended.add(running.known)
            self._running.remove(running)
        self._waiting = deque(request for request in self._waiting if request.finish_reason is None)


def default_room(engine: Engine, texts: int, schedulers: int = 1) -> int:
    """Tokens for `texts` texts as long as the model allows, or less: at most SHARE_OF_MEMORY of what is free.

    Args:
        schedulers: how many share this memory, each with an engine of its own.
    """
    fits = tokens_that_fit(engine, SHARE_OF_MEMORY / schedulers)
    return max(1, min(texts * engine.config.max_position_embeddings, fits))
