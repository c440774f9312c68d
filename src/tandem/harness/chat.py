"""Questions in a chat template: the one that the model was trained with, or the tokenizer's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.data.templates.messages import Message, Template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Chat:
    """A chat template in one thinking mode.

    Attributes:
        template: the template that the model was trained with, or that the user named; None for the tokenizer's.
        enable_thinking: None leaves it to the template.
    """

    tokenizer: Tokenizer
    template: Template | None = None
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.template is None and self.tokenizer.chat_template is None:
            raise UserError(f"--apply-chat-template: {self.tokenizer.lack_of_template}; --prompt-type chooses one")

    @property
    def name(self) -> str:
        return "the tokenizer's" if self.template is None else self.template.name

    @property
    def source(self) -> str:
        """The template's text; of a named one, its name."""
        return self.name if self.template is not None else str(self.tokenizer.chat_template)

    @property
    def sha256(self) -> str:
        return self.template.sha256 if self.template else hashlib.sha256(self.source.encode()).hexdigest()

    def text(self, history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to the answer. Without `add_generation_prompt`, the last message is its beginning.

        Raises:
            UserError: the template cannot hold these messages.
        """
        if self.template is not None:
            return self._named(self.template, history, add_generation_prompt)
        variables = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        text = self.tokenizer.apply_chat_template(history, add_generation_prompt=add_generation_prompt, **variables)
        return text if add_generation_prompt else _up_to(text, history[-1]["content"])

    @staticmethod
    def _named(template: Template, history: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        messages = [Message(entry["role"], entry["content"]) for entry in history]
        begun = "" if add_generation_prompt else messages.pop().content
        return "".join(template.generation_prompt(messages)) + begun


def _up_to(text: str, content: str) -> str:
    """A conversation's text, up to the end of its last message.

    >>> _up_to("<user>Hi<end>", "Hi")
    '<user>Hi'

    Raises:
        UserError: the template has changed the message.
    """
    begin = text.rfind(content.strip())
    if begin < 0:
        raise UserError("--apply-chat-template: the template changes the beginning of an answer, which a task gives")
    whole = content.lstrip()
    return text[:begin] + (whole if text.startswith(whole, begin) else content.strip())


def thinks(chat: Chat | None) -> bool:
    """Whether answers shall begin with a thought."""
    return chat is not None and bool(chat.enable_thinking)


def without_thought(answer: str, chat: Chat | None) -> str:
    """An answer after its thought.

    Where the template decides whether a model thinks, an answer without a thought keeps its spaces: it may be code.

    >>> without_thought("Well.</think>\\n\\n4", None)
    'Well.</think>\\n\\n4'
    """
    may_think = chat is not None and chat.enable_thinking is None and END_OF_THOUGHT in answer
    return answer.rpartition(END_OF_THOUGHT)[2].lstrip() if thinks(chat) or may_think else answer


def describe(chat: Chat | None) -> dict[str, Any]:
    """What results say of the template."""
    if chat is None:
        return {"chat_template": None, "chat_template_sha": None, "enable_thinking": None}
    return {
        "chat_template": chat.source,
        "chat_template_sha": chat.sha256,
        "enable_thinking": chat.enable_thinking,
    }
