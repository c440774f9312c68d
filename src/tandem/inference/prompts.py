"""Prompts from a JSON Lines file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import orjson

from tandem.errors import UserError
from tandem.files.text import read_lines
from tandem.inference.chat import Model
from tandem.inference.replies import Question
from tandem.inference.sampling import Sampling

PROMPT, MESSAGES, SEED = "prompt", "messages", "seed"
THINKING = "enable_thinking"
FOR_TEMPLATE = ("tools", THINKING, "chat_template_kwargs")  # fields of a line that a chat template gets


ANSWER = ("text", "token_ids", "finish_reason")  # fields of an answer
OPTIONS = ("stop", "max_tokens", "max_completion_tokens", *(option.name for option in fields(Sampling)))


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
    numbered = read_lines(path, "--prompts-file")
    lines = [_line(content, f"{path}:{number}", model, sampling, stop, raw) for number, content in numbered]
    if not lines:
        raise UserError(f'{path}: no prompts; expected a JSON object such as {{"prompt": "Hi"}} on each line')
    return lines


def notices(lines: Sequence[Line]) -> Iterator[str]:
    """What fields of the prompts are not taken as what they may be meant for: options, and fields of the answers."""
    names = {name for line in lines for name in line.fields}
    if unread := [name for name in OPTIONS if name in names and name != SEED]:
        yield (
            f"not read from the prompts: {', '.join(unread)}. Of how an answer is written, a line may only have its "
            f'"{SEED}"; the rest are flags, for all of them'
        )
    if hidden := [name for name in ANSWER if name in names]:
        yield f"fields of the prompts are replaced by those of the answers: {', '.join(hidden)}"


def _line(content: str, place: str, model: Model, sampling: Sampling, stop: tuple[str, ...], raw: bool) -> Line:
    try:
        values = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or (PROMPT in values) == (MESSAGES in values):
        raise UserError(f'{place}: expected an object with either "{PROMPT}" or "{MESSAGES}"')
    seed = values.get(SEED, sampling.seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f'{place}: "{SEED}" is {seed!r}; expected a whole number from 0')
    try:
        return Line(values, Question(_tokens(values, model, raw), replace(sampling, seed=seed), stop))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _tokens(values: Mapping[str, Any], model: Model, raw: bool) -> list[int]:
    if PROMPT in values and not isinstance(values[PROMPT], str):
        raise UserError(f'"{PROMPT}" is not a text')
    if raw and MESSAGES in values:
        raise UserError(f'"{MESSAGES}" need a chat template; leave out --raw')
    for_template = {name: values[name] for name in FOR_TEMPLATE if values.get(name) is not None}
    if PROMPT in values and (raw or not for_template):
        return model.prompt_ids(values[PROMPT])
    messages = values[MESSAGES] if MESSAGES in values else [{"role": "user", "content": values[PROMPT]}]
    thinking = {THINKING: for_template.pop(THINKING)} if THINKING in for_template else {}
    return model.prompter.prompt_of({**for_template, MESSAGES: messages}, thinking).ids
