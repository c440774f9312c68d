"""What a conversion did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count, tensor_table


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        folder: where the result is.
        iteration: the checkpoint's; None for a Hugging Face folder.
        tensors, parameters: how many were written.
        notices: messages for the user.
        verification: in words, whether logits were compared, and how much they differ.
        what: in words, what `folder` is.
        serving: commands that serve the result to others.
    """

    folder: Path
    iteration: int | None
    tensors: int
    parameters: int
    notices: tuple[str, ...] = ()
    verification: str = ""
    what: str = "Hugging Face model"
    serving: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, iteration: int | None, config: ModelConfig, notices: Sequence[str] = ()) -> Converted:
        return cls(folder, iteration, len(tensor_table(config)), parameter_count(config), tuple(notices))
