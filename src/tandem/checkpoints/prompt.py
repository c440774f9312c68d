"""The template that a fine-tuned checkpoint was trained with, as the checkpoint records it."""

from __future__ import annotations

import json
from typing import Any

from tandem.checkpoints.interface import TensorSource
from tandem.errors import UserError

PROMPT_FILE = "prompt.json"  # as the data's record gave it


def prompt_entry(source: TensorSource) -> dict[str, Any] | None:
    """The entry of the template; None where the weights were not fine-tuned.

    Raises:
        UserError: the file is damaged.
    """
    text = source.document(PROMPT_FILE)
    if text is None:
        return None
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise _damaged(source, str(error)) from error
    if not isinstance(entry, dict):
        raise _damaged(source, f"it holds {type(entry).__name__}, not a template")
    return entry


def _damaged(source: TensorSource, reason: str) -> UserError:
    return UserError(
        f"{source.location}/{PROMPT_FILE}: damaged: {reason}. Copy the file of another iteration of this run, or take "
        f"that iteration with --ckpt-step"
    )
