"""Messages and turns of a conversation, and the protocol of a template, which makes turns of messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tandem.errors import UserError


class ToolCall(NamedTuple):
    """A call that an assistant makes.

    Attributes:
        arguments: JSON text of the arguments.
        given_as_text: whether the data held that text, as OpenAI writes it, or an object. A model's chat template
            writes a text unchanged, and an object in its own format.
    """

    name: str
    arguments: str
    given_as_text: bool = False


class Message(NamedTuple):
    """One message.

    Attributes:
        role: system, user, assistant, or tool (the result of a call).
        reasoning: an assistant's thought, where the data has it in a separate field; else None.
        tool_calls: the calls that an assistant makes after the content.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class Turn(NamedTuple):
    """A prompt and its answer, as pieces of text. Each piece is tokenised separately.

    Attributes:
        source: pieces that are not trained.
        target: pieces that are trained.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]


class Template(Protocol):
    """A prompt type in one thinking mode.

    Attributes:
        stop_word: the token that ends a message; the end-of-document token of fine-tuning data.
        answer_header: what follows the text of a user, up to where an answer may begin.
        sha256: hash of the template's texts; the same in every thinking mode.
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


CHAT_TEMPLATE = "chat_template"  # the prompt type of the model's own template


def grouped(dialogue: Sequence[Message], last: str) -> list[tuple[str, list[Message]]]:
    """Turns of a conversation as (role, messages): user or tool results, and assistant, in alternation.

    Tool results in a row are one turn.

    >>> turns = grouped([Message("user", "Hi"), Message("assistant", "Hello")], last="assistant")
    >>> [role for role, _ in turns]
    ['user', 'assistant']

    Raises:
        UserError: the roles do not alternate, or the last turn is not of role `last`.
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
                f"turn {len(turns) + 1} has role {role!r}, expected {expected!r}; user and assistant must alternate"
            )
        turns.append((role, [message]))
        expected, other = other, expected
    if not turns or (turns[-1][0] == "assistant") != (last == "assistant"):
        ending = f"ends with {turns[-1][0]!r}" if turns else "has no turns"
        raise UserError(f"the conversation {ending}, expected it to end with {last!r}")
    return turns


def split_thought(answer: str) -> tuple[str, str]:
    """Thought and content of an answer. The thought is "" where the answer does not begin with `<think>`.

    >>> split_thought("<think>\\nEasy.\\n</think>\\n\\n4")
    ('Easy.', '4')
    """
    match = re.match(r"\s*<think>\n*(.*?)\n*</think>\n*", answer, re.DOTALL)
    return (match.group(1), answer[match.end() :]) if match else ("", answer)


def trained_on_last(turns: Sequence[Turn]) -> list[Turn]:
    """The same text, with only the last answer trained."""
    last = max(number for number, turn in enumerate(turns) if turn.target)
    return [turn if number == last else Turn((*turn.source, *turn.target), ()) for number, turn in enumerate(turns)]
