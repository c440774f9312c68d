"""The prompt type `empty`: texts as they are, without a template. Upstream and LLaMA-Factory call it so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.templates.messages import EMPTY, Message, Turn, grouped
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError


class PlainTemplate:
    """Texts follow each other with nothing between them. The end token ends each answer that does not end with it.

    The first text begins as the tokenizer begins a text, with its token for that where it has one.
    """

    name = EMPTY
    enable_thinking = None
    answer_header = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise UserError(
                f"{tokenizer.folder}: --prompt-type {EMPTY} needs an end token (eos_token in tokenizer_config.json, or "
                f"eos_token_id in generation_config.json or config.json)"
            )
        self.stop_word = tokenizer.decode([tokenizer.eos_id])
        self._beginning = tokenizer.decode(tokenizer.encode_prompt("x")[: -len(tokenizer.encode("x"))])
        self.sha256 = hashlib.sha256(f"{EMPTY} {self._beginning} {self.stop_word}".encode()).hexdigest()

    def turns(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """See `PromptTemplate.turns`."""
        return self._turns(messages, tools, range(len(messages)))

    def last_answer(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """The same text with only the last answer trained."""
        return self._turns(messages, tools, range(len(messages) - 1, len(messages)))

    def generation_prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> tuple[str, ...]:
        """The text before an answer."""
        _check(messages, tools, "user")
        return tuple(filter(None, (self._beginning, *map(self._text, messages))))

    def with_variables(self, variables: Mapping[str, Any]) -> PlainTemplate:
        """See `Template`. There is nothing to give to."""
        raise UserError(f"the record gives the template {dict(variables)}, and prompt type {EMPTY} has none")

    def _turns(self, messages: Sequence[Message], tools: Sequence[str], trained: range) -> list[Turn]:
        _check(messages, tools, "assistant")
        turns: list[Turn] = []
        source = [self._beginning] if self._beginning else []
        for number, message in enumerate(messages):
            if message.role == "assistant" and message.trained is not False and number in trained:
                turns.append(Turn(tuple(source), (self._text(message),)))
                source = []
            else:
                source.append(self._text(message))
        return [*turns, Turn(tuple(source), ())] if source else turns

    def _text(self, message: Message) -> str:
        is_open = message.role == "assistant" and not message.content.endswith(self.stop_word)
        return message.content + self.stop_word * is_open


def _check(messages: Sequence[Message], tools: Sequence[str], last: str) -> None:
    """Raise UserError for what only a template can write, and where the roles do not alternate."""
    if tools or any(message.tool_calls or message.reasoning or message.role == "tool" for message in messages):
        raise UserError(
            f"prompt type {EMPTY} writes texts alone, and the record has tools, calls or thoughts; choose another"
        )
    grouped(messages[1:] if messages and messages[0].role == "system" else messages, last)
