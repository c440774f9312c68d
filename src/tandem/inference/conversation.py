"""The prompt of a conversation, in the template that a model was fine-tuned with, or in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tandem.data.handlers.conversations import OpenAIInstructionHandler
from tandem.data.templates.messages import Message, Template
from tandem.data.templates.model_template import CHOOSE_ONE, ModelTemplate
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.inference.answers import THINK, Parts


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how its answer is to be read.

    Attributes:
        ids: token ids.
        in_thought: whether it ends inside a thought, which the answer goes on with.
        tools: the JSON text of each tool that it offers.
    """

    ids: list[int]
    in_thought: bool
    tools: tuple[str, ...]

    def parts(self) -> Parts:
        """A new reader of the answer."""
        return Parts(self.in_thought, self.tools)


class Prompter:
    """Writes the prompts of conversations for one model.

    Args:
        template: the one of fine-tuning; None for the tokenizer's chat template.
        thinking: `enable_thinking` of the tokenizer's chat template; None leaves it to the template.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template | None, thinking: bool | None = None) -> None:
        self._tokenizer, self._given, self._thinking = tokenizer, template, thinking

    def check(self) -> None:
        """Raise UserError when there is no template for a conversation."""
        self.template  # noqa: B018 - raises

    @cached_property
    def template(self) -> Template:
        """
        Raises:
            UserError: there is none.
        """
        tokenizer = self._tokenizer
        if self._given is None and tokenizer.chat_template is None and tokenizer.named_templates:
            raise UserError(f"{tokenizer.lack_of_template}; {CHOOSE_ONE}")
        if self._given is None and tokenizer.chat_template is None:
            raise UserError(
                "this model has no chat template, neither of its own nor from fine-tuning: it can only continue texts"
            )
        return self._given or ModelTemplate(tokenizer, self._thinking)

    @cached_property
    def _template_for_tools(self) -> Template:
        """The template of conversations with tools, where it may be the only one that the tokenizer has."""
        is_alone = self._tokenizer.chat_template is None and self._tokenizer.tool_template is not None
        if self._given is None and is_alone:
            return ModelTemplate(self._tokenizer.for_tools(), self._thinking)
        return self.template

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[str] = (), variables: Mapping[str, Any] | None = None
    ) -> Prompt:
        """The text before the answer to the last message.

        Args:
            tools: the JSON text of each tool.
            variables: for the template, such as `enable_thinking`.

        Raises:
            UserError: there is no template, or it cannot write this conversation.
        """
        template = self._template_for_tools if tools else self.template
        if variables:
            template = template.with_variables(variables)
        pieces = template.generation_prompt(messages, tools)
        ids = [token for piece in pieces for token in self._tokenizer.encode(piece)]
        return Prompt(ids, "".join(pieces).rstrip().endswith(THINK), tuple(tools))

    def prompt_of(self, record: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> Prompt:
        """The same for a conversation as OpenAI writes it, read as training data are.

        Args:
            record: `messages`, and if they are there `tools` and `chat_template_kwargs`.
            variables: others for the template.

        Raises:
            UserError: a field cannot be used; or as `prompt`.
        """
        handler = OpenAIInstructionHandler()
        given = {**(variables or {}), **handler.template_variables(record)}
        return self.prompt(handler.messages(record), handler.tools(record), given)
