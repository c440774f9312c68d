"""One conversation on an engine. The keys and values of what stays of it are computed once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import TracebackType

from tandem.backends.interface import Engine, Piece, Session
from tandem.errors import UserError
from tandem.inference.room import memory_notice, tokens_that_fit
from tandem.inference.sampling import Chooser, Sampling

PROMPT_TOKENS = 512  # of a prompt in one step: between two steps an answer can be stopped
SHARE_OF_MEMORY = 0.5  # of what is free, for keys and values at most
SEQUENCES = 2  # what stays, and the answer that is being written


class Continuing:
    """Answers the prompts of one conversation, one after the other. Use it as a context, which ends its session.

    A prompt repeats the earlier ones, up to where its template writes the last answer in another way. So the beginning
    that the next prompt will have, too, is kept in a sequence of its own, and each answer goes on with a copy.

    Attributes:
        room: how many tokens a prompt and its answer may have together.
        ended: whether the last answer came to its end token.

    Of the ranks that hold a copy of the model together, the first leads; the others only call `follow`.

    Args:
        conversations: how many share the free memory, each with an engine of its own.
        other: with another model on the same ranks. Those that do not lead follow both, by following one of them.
    """

    def __init__(self, engine: Engine, conversations: int = 1, other: Continuing | None = None) -> None:
        self._engine = engine
        fits = tokens_that_fit(engine, SHARE_OF_MEMORY / conversations) // SEQUENCES
        self.room = max(2, min(engine.config.max_position_embeddings, fits))
        self.ended = False
        self._session: Session = engine.session(SEQUENCES * self.room, None if other is None else other._session)
        self._kept: int | None = None
        self._kept_tokens: list[int] = []

    def __enter__(self) -> Continuing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()

    def follow(self) -> None:
        """On ranks that do not lead: compute what the first one asks for, until it closes the session."""
        self._session.follow()

    @property
    def notice(self) -> str:
        """How much memory the keys and values may take."""
        return memory_notice(self._engine, SEQUENCES * self.room, f"{self.room:,} tokens, {SEQUENCES} times")

    def answer(
        self, prompt: Sequence[int], lasting: int, sampling: Sampling, stop_ids: Collection[int]
    ) -> Iterator[int | None]:
        """The tokens of the answer, without its end token. None comes while the prompt is read.

        Args:
            lasting: with how many of these tokens the next prompt will begin, too; fewer than all.

        Raises:
            UserError: the prompt leaves no room for an answer.
        """
        if not prompt or len(prompt) >= self.room:
            raise UserError(f"the conversation has {len(prompt):,} tokens; there is room for {self.room:,}")
        yield from self._keep(prompt[:lasting])
        assert self._kept is not None
        sequence = self._session.copy(self._kept)
        try:
            yield from self._continue(sequence, prompt, lasting, sampling, stop_ids)
        finally:
            self._session.end(sequence)

    def _keep(self, tokens: Sequence[int]) -> Iterator[None]:
        """Have these tokens in the sequence that stays."""
        known = len(self._kept_tokens)
        if self._kept is None or self._kept_tokens != list(tokens[:known]):
            if self._kept is not None:
                self._session.end(self._kept)
            self._kept, self._kept_tokens, known = self._session.begin(self.room), [], 0
        for first in range(known, len(tokens), PROMPT_TOKENS):
            new = tokens[first : first + PROMPT_TOKENS]
            for _ in self._session.step([Piece(self._kept, new, [])]):
                pass
            self._kept_tokens += new
            yield None

    def _continue(
        self, sequence: int, prompt: Sequence[int], known: int, sampling: Sampling, stop_ids: Collection[int]
    ) -> Iterator[int | None]:
        choose, self.ended = Chooser(sampling, prompt), False
        while len(prompt) - known > PROMPT_TOKENS:
            for _ in self._session.step([Piece(sequence, prompt[known : known + PROMPT_TOKENS], [])]):
                pass
            known += PROMPT_TOKENS
            yield None
        new = prompt[known:]
        for _ in range(min(sampling.max_new_tokens, self.room - len(prompt))):
            (logits,) = self._session.step([Piece(sequence, new, [len(new) - 1])])
            token = choose(logits)
            if token in stop_ids:
                self.ended = True
                return
            yield token
            new = [token]
