"""`tandem.json`: what conversions record in a Hugging Face folder, and in the `hf/` of a checkpoint.

It says that Tandem wrote the folder, so that nobody takes it for the original model, and which rows were added to the
vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tandem.checkpoints.interface import Companions
from tandem.version import __version__

RECORD = "tandem.json"
CERTIFICATE = "certificate.json"  # of an export: a statement about this folder, which is not copied to others
RESIZES = "resized_vocabulary"


def recorded(companions: Companions, *, resize: tuple[int, int] | None = None) -> Companions:
    """The companions with a record. `resize`: rows of the vocabulary before and after a change."""
    resizes = resizes_of(companions)
    if resize:
        resizes = [*resizes, {"from": resize[0], "to": resize[1], "new_rows": "the mean of the others"}]
    record = {"version": __version__, **({RESIZES: resizes} if resizes else {})}
    files = [path for path in companions.files if path.name != RECORD]
    texts = {**companions.texts, RECORD: json.dumps(record, indent=2) + "\n"}
    return dataclasses.replace(companions, files=files, texts=texts)


def resizes_of(companions: Companions) -> list[dict[str, Any]]:
    """What was done to the vocabulary: for each step the rows `from` and `to`, and what `new_rows` are."""
    text = companions.text_of(RECORD)
    steps: list[dict[str, Any]] = json.loads(text).get(RESIZES, []) if text else []
    return steps
