"""What another program makes of a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FolderReading:
    """What transformers makes of a folder.

    Attributes:
        reader: the program with its version.
        prompts: the tokens of each plain text, as it begins; and of each conversation, with the beginning of an answer,
            or None where there is no template, or it refuses.
        end_ids: the tokens at which `generate()` stops.
        logits: of each sequence, fp32 [tokens, vocabulary], computed in fp32.
        missing: weights of the model that the files lack. They are drawn at random, or are those of a new model.
        unexpected: weights in the files that the model does not have.
    """

    reader: str
    prompts: tuple[tuple[int, ...] | None, ...]
    end_ids: tuple[int, ...]
    logits: tuple[np.ndarray, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
