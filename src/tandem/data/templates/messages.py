"""Messages and turns of a conversation, and the protocol of a template, which makes turns of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
        trained: whether the data say that it is trained; None where they do not say. Answers are, unless this is False.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    trained: bool | None = None


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

    def with_variables(self, variables: Mapping[str, Any]) -> Template:
        """The template with variables that a record gives it, such as `enable_thinking`.

        Raises:
            UserError: this template has no such variable, or not with such a value.
        """
        ...


CHAT_TEMPLATE = "chat_template"  # the prompt type of the model's own template
EMPTY = "empty"  # the prompt type without a template


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


def only_last_trained(messages: Sequence[Message]) -> list[Message]:
    """The same messages, with only the last one trained."""
    return [*(message._replace(trained=False) for message in messages[:-1]), *messages[-1:]]


def untrained(turn: Turn) -> Turn:
    """The same text, with nothing trained.

    >>> untrained(Turn(("Hi",), ("Hello",)))
    Turn(source=('Hi', 'Hello'), target=())
    """
    return Turn((*turn.source, *turn.target), ())


def join_neighbours(messages: Sequence[Message]) -> list[Message]:
    """One message for several of one role in a row, each text on lines of its own. Tool results stay apart.

    >>> [message.content for message in join_neighbours([Message("user", "a"), Message("user", "b")])]
    ['a\\nb']

    Raises:
        UserError: answers in a row cannot be one: only one is trained, or a later one thinks or follows a call.
    """
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role != "tool":
            joined[-1] = _joined(joined[-1], message)
        else:
            joined.append(message)
    return joined


def _joined(first: Message, second: Message) -> Message:
    if first.role == "assistant":
        if (first.trained is False) != (second.trained is False):
            raise UserError(
                "two answers in a row, and only one of them is trained; put the user's message between them"
            )
        if second.reasoning or "</think>" in second.content or (first.tool_calls and second.content):
            raise UserError(
                "two answers in a row that cannot be one: the second has a thought, or follows a call; put the message "
                "between them that is missing"
            )
    content = "\n".join(filter(None, (first.content, second.content)))
    return first._replace(content=content, tool_calls=first.tool_calls + second.tool_calls)
