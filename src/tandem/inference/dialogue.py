"""A conversation with a model: what was said, and the next answer piece by piece."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tandem.data.templates.messages import Message
from tandem.errors import UserError
from tandem.inference.answers import Answer, Piece
from tandem.inference.beginnings import common_beginning
from tandem.inference.chat import Model
from tandem.inference.continuing import Continuing
from tandem.inference.conversation import Prompt
from tandem.inference.sampling import Sampling


@dataclass
class Speed:
    """How quickly an answer came.

    Attributes:
        first_token: seconds until the first one.
        seconds: from then to the last one.
    """

    tokens: int = 0
    first_token: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.tokens:
            return "no tokens"
        rate = f", {(self.tokens - 1) / self.seconds:.1f} tokens/s" if self.tokens > 1 and self.seconds else ""
        return f"{self.tokens} tokens{rate}, the first after {self.first_token:.1f} s"


class Dialogue:
    """A conversation.

    Attributes:
        messages: questions and answers, without the system message. Answers have their thoughts.
        system: the system message; None without one.
        thinking: `enable_thinking` of the template; None leaves it to the template.
        sampling: how tokens are chosen. Each answer that is written again draws from the next seed.
        speed: of the last answer.
        cut: why the last answer is not whole; "" when it is.

    Args:
        dialogues: how many share the free memory, each with a model of its own.
        other: one of them that was made before; None for the first.
    """

    def __init__(self, model: Model, sampling: Sampling, dialogues: int = 1, other: Dialogue | None = None) -> None:
        self.model, self.sampling = model, sampling
        self.messages: list[Message] = []
        self.system: str | None = None
        self.thinking: bool | None = None
        self.speed, self.cut = Speed(), ""
        self._continuing: Continuing = Continuing(model.engine, dialogues, None if other is None else other._continuing)
        self._again = 0  # times that the last question was answered again

    def close(self) -> None:
        self._continuing.close()

    def follow(self) -> None:
        """On other processes than the first: compute its answers, until it closes the dialogues of all models."""
        self._continuing.follow()

    @property
    def notice(self) -> str:
        """How much memory the conversation may take."""
        return self._continuing.notice

    def thinks_on_demand(self) -> bool:
        """Whether the template asks otherwise with `enable_thinking` true than with false."""
        question = [Message("user", "x")]
        try:
            on, off = (
                self.model.prompter.prompt(question, (), {"enable_thinking": mode}).ids for mode in (True, False)
            )
        except UserError:
            return False
        return on != off

    def ask(self, text: str) -> None:
        """Add a question. `answer` answers it."""
        self.messages.append(Message("user", text))
        self._again = 0

    def ask_again(self) -> bool:
        """Take the last answer back, so that `answer` writes another one. False when nothing was asked."""
        if self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        if not self.messages:
            return False
        self._again += 1
        return True

    def take_back(self) -> None:
        """Remove the last question, which got no answer."""
        if self.messages and self.messages[-1].role == "user":
            self.messages.pop()

    def answer(self) -> Iterator[Piece | None]:
        """The answer to the last question, which becomes a part of the conversation. None comes while nothing is said.

        When it is given up, what was said so far stays. Without a word, the question is taken back.

        Raises:
            UserError: the template cannot write the conversation, or it is too long. The question is taken back.
        """
        try:
            prompt = self._prompt(self.messages)
            lasting = self._lasting(prompt)
        except UserError:
            self.take_back()
            raise
        said: dict[str, str] = {"text": "", "thought": ""}
        answer = Answer(self.model.tokenizer, parts=prompt.parts())
        begin = time.monotonic()
        self.speed, self.cut = Speed(), "stopped"
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + self._again)
        try:
            for token in self._continuing.answer(prompt.ids, lasting, sampling, self.model.stop_ids()):
                if token is not None:
                    self._count(begin)
                pieces = _kept([] if token is None else answer.feed([token]), said)
                yield from pieces
                if not pieces:
                    yield None
            yield from _kept(answer.end(), said)
            self.cut = "" if self._continuing.ended else "cut: there is no room for more"
            if not self._continuing.ended and self.speed.tokens == sampling.max_new_tokens:
                self.cut = f"cut after {sampling.max_new_tokens} tokens (/set max_new_tokens)"
        finally:
            if said["text"] or said["thought"] or not self.cut:
                self.messages.append(Message("assistant", said["text"], said["thought"] or None))
            else:
                self.take_back()

    def to_record(self) -> dict[str, Any]:
        """The conversation in the form of training data."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"messages": [*system, *(_as_record(message) for message in self.messages)]}

    def _prompt(self, messages: list[Message]) -> Prompt:
        system = [] if self.system is None else [Message("system", self.system)]
        variables = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return self.model.prompter.prompt([*system, *messages], (), variables)

    def _lasting(self, prompt: Prompt) -> int:
        """With how many of its tokens the next prompt will begin, whatever is answered and asked."""
        try:
            later = self._prompt([*self.messages, Message("assistant", "x"), Message("user", "x")])
        except UserError:  # a template of one question only
            return 0
        return min(common_beginning(prompt.ids, later.ids), len(prompt.ids) - 1)

    def _count(self, begin: float) -> None:
        speed, now = self.speed, time.monotonic() - begin
        speed.tokens += 1
        if speed.tokens == 1:
            speed.first_token = now
        speed.seconds = now - speed.first_token


def _kept(pieces: list[Piece], said: dict[str, str]) -> list[Piece]:
    """The pieces, which are also added to what was said."""
    for piece in pieces:
        said[piece.kind] += piece.text
    return pieces


def _as_record(message: Message) -> dict[str, str]:
    thought = {"reasoning_content": message.reasoning} if message.reasoning else {}
    return {"role": message.role, "content": message.content, **thought}
