"""All prompt types by name. A prompt type makes pieces of text of a conversation, and says which are trained.

`qwen3` is MindSpeed-LLM's template, character for character. On a conversation of one turn it agrees with Qwen3's own
chat template, in every thinking mode. On longer ones, the two differ in the earlier answers:

- The model's template removes their thoughts, and writes no empty thoughts.
- `qwen3` trains every answer. So it keeps all thoughts, and gives each answer without a thought an empty one.

`generation_prompt` removes earlier thoughts, as the model's template does.

`chat_template` is the model's own template, and `empty` none at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tandem.data.templates.messages import CHAT_TEMPLATE, EMPTY, Template
from tandem.data.templates.named import NAMED_TEMPLATES
from tandem.errors import UserError, nearest

if TYPE_CHECKING:
    from tandem.data.tokens.tokenizer import Tokenizer

# value of --enable-thinking -> `enable_thinking` of a template
THINKING_MODES = {"true": True, "false": False, "none": None}
PROMPT_TYPES = sorted([*NAMED_TEMPLATES, CHAT_TEMPLATE, EMPTY])


def check_prompt_type(prompt_type: str) -> None:
    """Raise UserError for an unknown name."""
    if prompt_type not in PROMPT_TYPES:
        raise UserError(
            f"prompt type {prompt_type!r}: expected one of {PROMPT_TYPES}{nearest(prompt_type, PROMPT_TYPES)}"
        )


def get_template(prompt_type: str, enable_thinking: bool | None = None, tokenizer: Tokenizer | None = None) -> Template:
    """The template of a `--prompt-type`. The type `chat_template` is the model's own template, from `tokenizer`.

    >>> from tandem.data.templates.messages import Message
    >>> get_template("qwen3").generation_prompt([Message("user", "Hi")])
    ('<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n', '<think>\\n\\n</think>\\n\\n')

    Raises:
        UserError: the name is unknown, there is no tokenizer to take it from, or it has no thinking modes.
    """
    from tandem.data.templates.model_template import ModelTemplate  # which builds on this module
    from tandem.data.templates.plain import PlainTemplate

    check_prompt_type(prompt_type)
    if prompt_type in NAMED_TEMPLATES:
        return dataclasses.replace(NAMED_TEMPLATES[prompt_type], enable_thinking=enable_thinking)
    if tokenizer is None:
        raise UserError(f"prompt type {prompt_type} needs a tokenizer, which holds it; give --tokenizer-name-or-path")
    if prompt_type == CHAT_TEMPLATE:
        return ModelTemplate(tokenizer, enable_thinking)
    if enable_thinking is not None:
        raise UserError(f"prompt type {EMPTY} has no thinking modes; leave --enable-thinking out")
    return PlainTemplate(tokenizer)


def template_from_entry(entry: Mapping[str, Any] | None, tokenizer: Tokenizer | None) -> Template | None:
    """The template that a data record or a checkpoint names; None where it has no template."""
    return get_template(entry["prompt_type"], entry["enable_thinking"], tokenizer) if entry else None
