"""Prompts from a JSON Lines file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from tandem.errors import UserError
from tandem.files.text import unreadable
from tandem.inference.chat import Model
from tandem.inference.replies import Question
from tandem.inference.sampling import Sampling

PROMPT, MESSAGES, SEED = "prompt", "messages", "seed"
THINKING = "enable_thinking"
FOR_TEMPLATE = ("tools", THINKING, "chat_template_kwargs")  # fields of a line that a chat template gets


@dataclass(frozen=True)
class Line:
    """One line of the file: its fields, and the question in them."""

    fields: Mapping[str, Any]
    question: Question


def read_prompts(path: Path, model: Model, sampling: Sampling, stop: tuple[str, ...], *, raw: bool) -> list[Line]:
    """The prompts of a file, in order. Empty lines are left out.

    Args:
        raw: prompts are continued as plain text, and conversations are refused.

    Raises:
        UserError: a line cannot be used; the number of the line is named. Or there is no line.
    """
    lines = []
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, 1):
                if content.strip():
                    lines.append(_line(content, f"{path}:{number}", model, sampling, stop, raw))
    except OSError as error:
        raise UserError(unreadable(str(path), error)) from error
    if not lines:
        raise UserError(f'{path}: no prompts; expected a JSON object such as {{"prompt": "Hi"}} on each line')
    return lines


def _line(content: bytes, place: str, model: Model, sampling: Sampling, stop: tuple[str, ...], raw: bool) -> Line:
    try:
        fields = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(fields, dict) or (PROMPT in fields) == (MESSAGES in fields):
        raise UserError(f'{place}: expected an object with either "{PROMPT}" or "{MESSAGES}"')
    seed = fields.get(SEED, sampling.seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f'{place}: "{SEED}" is {seed!r}; expected a whole number from 0')
    try:
        return Line(fields, Question(_tokens(fields, model, raw), replace(sampling, seed=seed), stop))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _tokens(fields: Mapping[str, Any], model: Model, raw: bool) -> list[int]:
    if PROMPT in fields and not isinstance(fields[PROMPT], str):
        raise UserError(f'"{PROMPT}" is not a text')
    if raw and MESSAGES in fields:
        raise UserError(f'"{MESSAGES}" need a chat template; leave out --raw')
    for_template = {name: fields[name] for name in FOR_TEMPLATE if fields.get(name) is not None}
    if PROMPT in fields and (raw or not for_template):
        return model.prompt_ids(fields[PROMPT])
    messages = fields[MESSAGES] if MESSAGES in fields else [{"role": "user", "content": fields[PROMPT]}]
    thinking = {THINKING: for_template.pop(THINKING)} if THINKING in for_template else {}
    return model.prompter.prompt_of({**for_template, MESSAGES: messages}, thinking).ids
