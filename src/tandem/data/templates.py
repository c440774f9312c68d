"""Prompt types: how a conversation becomes pieces of text, and which of them are trained.

`qwen3` is MindSpeed-LLM's, character for character. It agrees with Qwen3's own chat template on a conversation of one
turn, in every thinking mode. It differs on earlier turns of a longer one: the model's template strips the thoughts of
earlier answers and writes no empty ones, while training here keeps all thoughts and, since every answer is trained,
gives each answer without a thought an empty one. `generation_prompt` strips earlier thoughts as the model's does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError, nearest


@dataclass(frozen=True)
class Message:
    """One message; `reasoning` is an assistant's thought when the data keeps it apart from the content."""

    role: str
    content: str
    reasoning: str = ""


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer to it, as pieces of text that are tokenised one by one.

    Attributes:
        source: not trained.
        target: trained.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt type in one thinking mode.

    Attributes:
        system, user, assistant: the text of a message; `{content}` is what it says.
        stop_word: the token that ends a message; the end-of-document token of fine-tuning data.
        thought_words: what begins and ends a thought.
        enable_thinking: for an answer without a thought, an empty one is written: True trains it; None and False put it
            into the prompt, untrained. False also removes the thoughts of all answers.
    """

    name: str
    system: str
    user: str
    assistant: str
    stop_word: str
    thought_words: tuple[str, str]
    enable_thinking: bool | None = None

    @property
    def sha256(self) -> str:
        """Identity of the texts, whatever the thinking mode."""
        texts = {**dataclasses.asdict(self), "enable_thinking": None}
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """The trained form of a conversation: [system], then user and assistant in turn.

        Raises:
            UserError: the roles do not follow each other so.
        """
        prefix, dialogue = self._split_system(messages)
        _check_roles(dialogue, "assistant")
        turns = []
        for user, assistant in zip(dialogue[0::2], dialogue[1::2]):
            answer = self._answer(assistant)
            source = (*prefix, self.user.format(content=user.content))
            target: tuple[str, ...] = (self.assistant.format(content=answer),)
            if not self._has_thought(answer):
                if self.enable_thinking:
                    target = (self._empty_thought, *target)
                else:
                    source = (*source, self._empty_thought)
            turns.append(Turn(source, target))
            prefix = ()
        return turns

    def generation_prompt(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """The pieces before the answer to a conversation that ends with the user; earlier thoughts are left out."""
        prefix, dialogue = self._split_system(messages)
        _check_roles(dialogue, "user")
        pieces = list(prefix)
        for message in dialogue:
            if message.role == "user":
                pieces.append(self.user.format(content=message.content))
            else:
                pieces.append(self.assistant.format(content=self._without_thought(message.content)))
        return tuple(pieces) if self.enable_thinking else (*pieces, self._empty_thought)

    @property
    def _empty_thought(self) -> str:
        return "".join(self.thought_words)

    def _split_system(self, messages: Sequence[Message]) -> tuple[tuple[str, ...], Sequence[Message]]:
        if messages and messages[0].role == "system":
            system = messages[0].content
            return ((self.system.format(content=system),) if system else ()), messages[1:]
        return (), messages

    def _answer(self, message: Message) -> str:
        begin, end = self.thought_words
        content = f"{begin}{message.reasoning}{end}{message.content}" if message.reasoning else message.content
        return self._without_thought(content) if self.enable_thinking is False else content

    def _has_thought(self, answer: str) -> bool:
        return any(word in answer for word in self.thought_words)

    def _without_thought(self, answer: str) -> str:
        begin, end = map(re.escape, self.thought_words)
        return re.sub(f"{begin}.*?{end}", "", answer, flags=re.DOTALL).lstrip("\n")


_TEMPLATES = {
    template.name: template
    for template in [
        PromptTemplate(
            name="qwen3",
            system="<|im_start|>system\n{content}<|im_end|>\n",
            user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
            assistant="{content}<|im_end|>\n",
            stop_word="<|im_end|>",
            thought_words=("<think>\n", "\n</think>\n\n"),
        ),
    ]
}
PROMPT_TYPES = sorted(_TEMPLATES)


def get_template(prompt_type: str, enable_thinking: bool | None = None) -> PromptTemplate:
    """The template of a `--prompt-type`; an unknown name is an error."""
    if prompt_type not in _TEMPLATES:
        raise UserError(
            f"prompt type {prompt_type!r}: expected one of {PROMPT_TYPES}{nearest(prompt_type, PROMPT_TYPES)}"
        )
    return dataclasses.replace(_TEMPLATES[prompt_type], enable_thinking=enable_thinking)


def template_from_entry(entry: Mapping[str, Any] | None) -> PromptTemplate | None:
    """The template that a data record or a checkpoint names; None where it names none."""
    return get_template(entry["prompt_type"], entry["enable_thinking"]) if entry else None


def _check_roles(dialogue: Sequence[Message], last: str) -> None:
    for number, message in enumerate(dialogue, start=1):
        expected = "user" if number % 2 else "assistant"
        if message.role != expected:
            raise UserError(
                f"turn {number} has role {message.role!r}, expected {expected!r}; user and assistant alternate"
            )
    if not dialogue or dialogue[-1].role != last:
        found = f"ends with {dialogue[-1].role!r}" if dialogue else "has no turns"
        raise UserError(f"the conversation {found}, expected it to end with {last!r}")
