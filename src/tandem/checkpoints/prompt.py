"""The template that a fine-tuned checkpoint was trained with, as the checkpoint records it."""

from __future__ import annotations

import json
from typing import Any

from tandem.checkpoints.interface import TensorSource

PROMPT_FILE = "prompt.json"  # as the data's record gave it


def prompt_entry(source: TensorSource) -> dict[str, Any] | None:
    """The entry of the template; None where the weights were not fine-tuned."""
    text = source.document(PROMPT_FILE)
    entry: dict[str, Any] | None = None if text is None else json.loads(text)
    return entry
