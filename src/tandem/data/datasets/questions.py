"""Multiple-choice questions, one per line: `{"context", "choices", "answer"}`. The model chooses the likeliest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tandem.data.batch import IGNORE, Sample
from tandem.data.handlers.fields import described, field, string
from tandem.data.handlers.registry import detect_handler, make_handler
from tandem.data.no_dataset import preprocess_first
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.files.text import read_lines

SUFFIX = ".jsonl"
_FIELDS = "a question is {context: text, choices: [text, ...], answer: number of the right choice, from 0}"


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        context, choices: texts; each choice follows the context directly.
        answer: number of the right choice, from 0.
        samples: context and choice as tokens, one sample per choice; only the choice has labels.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    samples: tuple[Sample, ...]


def holds_questions(path: str) -> bool:
    """Whether a data path names questions, and not the prefix of preprocessed files."""
    return path.endswith(SUFFIX) and os.path.isfile(path)


def read_questions(path: str | Path, tokenizer: Tokenizer, seq_length: int) -> list[Question]:
    """All questions of a file; empty lines are skipped.

    Raises:
        UserError: a line is not a question, or is longer than `seq_length` tokens, or the file has no question.
    """
    questions = []
    for number, line in read_lines(path):
        try:
            questions.append(_question(line, str(path), tokenizer, seq_length))
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not questions:
        raise UserError(f"{path}: no question; {_FIELDS}")
    return questions


def _question(line: str, path: str, tokenizer: Tokenizer, seq_length: int) -> Question:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error}; {_FIELDS}") from None
    if not isinstance(record, dict):
        raise UserError(f"expected an object, found {described(record)}; {_FIELDS}")
    if "choices" not in record and (kind := _kind_of_rows(record)):
        raise UserError(f"a row of {kind}, and not a question: {preprocess_first(path)}; {_FIELDS}")
    context = string(record, "context", _FIELDS)
    choices, answer = _choices(record)
    samples = tuple(_sample(context, choice, tokenizer, seq_length) for choice in choices)
    return Question(context, choices, answer, samples)


def _kind_of_rows(record: Mapping[str, Any]) -> str | None:
    """What a row holds that is for preprocessing: `conversations`; None where no handler reads it."""
    try:
        name, map_keys = detect_handler(record, ("text",), None)
    except UserError:
        return None
    return make_handler(name, map_keys=map_keys).kind.name


def _choices(record: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    choices, answer = field(record, "choices", _FIELDS), field(record, "answer", _FIELDS)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise UserError(f"field 'choices': expected two texts or more, none of them empty, found {described(choices)}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(f"field 'answer': expected a number from 0 to {len(choices) - 1}, found {described(answer)}")
    return tuple(choices), answer


def _sample(context: str, choice: str, tokenizer: Tokenizer, seq_length: int) -> Sample:
    """Context and choice, tokenised together; the tokens of the context alone show where the choice begins.

    White space at the end of the context counts as part of the choice's first token. Source: `_encode_pair` of
    lm-evaluation-harness.
    """
    stripped = context.rstrip()
    begin = len(tokenizer.encode(stripped))
    ids = np.asarray(tokenizer.encode(context + choice), np.int32)
    if not begin or begin >= len(ids):
        raise UserError("field 'context': expected text before the choices, and choices of at least one token")
    if len(ids) - 1 > seq_length:
        raise UserError(f"context and choice have {len(ids)} tokens, but --seq-length is {seq_length}; raise it")
    labels = ids[1:].copy()
    labels[: begin - 1] = IGNORE
    return Sample(ids[:-1], labels, np.arange(len(labels), dtype=np.int32), (len(labels),))
