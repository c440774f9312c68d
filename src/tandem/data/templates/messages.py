"""Conversations before they are text: messages, turns, and what a template makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tandem.errors import UserError


class ToolCall(NamedTuple):
    """A call that an assistant makes.

    Attributes:
        arguments: JSON text.
        given_as_text: that text stood in the data, as OpenAI writes it, and not an object. Chat templates of models
            write a text as it stands and an object in their own way.
    """

    name: str
    arguments: str
    given_as_text: bool = False


class Message(NamedTuple):
    """One message.

    Attributes:
        role: system, user, assistant, or tool for the result of a call.
        reasoning: an assistant's thought, when the data keeps it apart from the content; None when it does not.
        tool_calls: that an assistant makes after the content.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class Turn(NamedTuple):
    """A prompt and the answer to it, as pieces of text that are tokenised one by one.

    Attributes:
        source: not trained.
        target: trained.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]


class Template(Protocol):
    """A prompt type in one thinking mode.

    Attributes:
        stop_word: the token that ends a message; the end-of-document token of fine-tuning data.
        answer_header: what follows the text of a user, up to where an answer may begin.
        sha256: identity of its texts, whatever the thinking mode.
    """

    @property
    def name(self) -> str: ...

    @property
    def enable_thinking(self) -> bool | None: ...

    @property
    def stop_word(self) -> str: ...

    @property
    def answer_header(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    def turns(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]: ...

    def last_answer(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]: ...

    def generation_prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> tuple[str, ...]: ...


CHAT_TEMPLATE = "chat_template"  # the prompt type that is the model's own template


def grouped(dialogue: Sequence[Message], last: str) -> list[tuple[str, list[Message]]]:
    """Turns of a conversation as (role, messages): user or results of tools, then assistant, again and again.

    Results that follow each other are one turn.

    Raises:
        UserError: the roles do not follow each other so, or the last turn is not `last`.
    """
    turns: list[tuple[str, list[Message]]] = []
    expected, other = "user", "assistant"
    for message in dialogue:
        role = message.role
        if role == "tool" and turns and turns[-1][0] == "tool":
            turns[-1][1].append(message)
            continue
        if role != expected and not (role == "tool" and expected == "user" and turns):
            raise UserError(
                f"turn {len(turns) + 1} has role {role!r}, expected {expected!r}; user and assistant alternate"
            )
        turns.append((role, [message]))
        expected, other = other, expected
    if not turns or (turns[-1][0] == "assistant") != (last == "assistant"):
        found = f"ends with {turns[-1][0]!r}" if turns else "has no turns"
        raise UserError(f"the conversation {found}, expected it to end with {last!r}")
    return turns


def split_thought(answer: str) -> tuple[str, str]:
    """Thought and content of an answer that begins with `<think>`; no thought if it does not."""
    match = re.match(r"\s*<think>\n*(.*?)\n*</think>\n*", answer, re.DOTALL)
    return (match.group(1), answer[match.end() :]) if match else ("", answer)


def trained_on_last(turns: Sequence[Turn]) -> list[Turn]:
    """The same text, of which only the last answer is trained."""
    last = max(number for number, turn in enumerate(turns) if turn.target)
    return [turn if number == last else Turn((*turn.source, *turn.target), ()) for number, turn in enumerate(turns)]
