"""Prompt types: how a conversation becomes pieces of text, and which of them are trained.

`qwen3` is MindSpeed-LLM's, character for character. It agrees with Qwen3's own chat template on a conversation of one
turn, in every thinking mode. It differs on earlier turns of a longer one: the model's template strips the thoughts of
earlier answers and writes no empty ones, while training here keeps all thoughts and, since every answer is trained,
gives each answer without a thought an empty one. `generation_prompt` strips earlier thoughts as the model's does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tandem.data.templates.messages import CHAT_TEMPLATE, Template
from tandem.data.templates.named import NAMED_TEMPLATES
from tandem.errors import UserError, nearest

if TYPE_CHECKING:
    from tandem.data.tokens.tokenizer import Tokenizer

# Spelling of --enable-thinking -> a template's thinking mode
THINKING_MODES = {"true": True, "false": False, "none": None}
PROMPT_TYPES = sorted([*NAMED_TEMPLATES, CHAT_TEMPLATE])


def check_prompt_type(prompt_type: str) -> None:
    """An unknown name is an error."""
    if prompt_type not in PROMPT_TYPES:
        raise UserError(
            f"prompt type {prompt_type!r}: expected one of {PROMPT_TYPES}{nearest(prompt_type, PROMPT_TYPES)}"
        )


def get_template(prompt_type: str, enable_thinking: bool | None = None, tokenizer: Tokenizer | None = None) -> Template:
    """The template of a `--prompt-type`; an unknown name is an error. `chat_template` is that of `tokenizer`."""
    from tandem.data.templates.model_template import ModelTemplate  # which builds on this module

    check_prompt_type(prompt_type)
    if prompt_type != CHAT_TEMPLATE:
        return dataclasses.replace(NAMED_TEMPLATES[prompt_type], enable_thinking=enable_thinking)
    if tokenizer is None:
        raise UserError(f"prompt type {CHAT_TEMPLATE} is the tokenizer's, and no tokenizer is known; name its folder")
    return ModelTemplate(tokenizer, enable_thinking)


def template_from_entry(entry: Mapping[str, Any] | None, tokenizer: Tokenizer | None) -> Template | None:
    """The template that a data record or a checkpoint names; None where it names none."""
    return get_template(entry["prompt_type"], entry["enable_thinking"], tokenizer) if entry else None
