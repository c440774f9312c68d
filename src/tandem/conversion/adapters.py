"""Adapters on their way out: alone, as a PEFT folder, or merged into the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tandem.checkpoints.adapters.peft import unlike_over_transformers_5, write_peft
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.conversion.result import Converted
from tandem.errors import UserError
from tandem.models.lora import Lora
from tandem.models.tensors import trained_count

# Changes the files next to weights so that they fit the training of these; also returns notices.
Adapt = Callable[[TensorSource, Companions], tuple[Companions, list[str]]]


def export_adapters(source: TensorSource, folder: Path, adapt: Adapt | None = None) -> Converted:
    """Write the adapters of a source as a PEFT folder, with the tokenizer's files.

    Raises:
        UserError: the source has none, or the folder exists.
    """
    config = source.config
    if config.lora is None:
        raise UserError(f"--save-lora-to-hf: {source.location} has no adapters: give theirs with --lora-load")
    base = (source.base or source).folder
    companions, more = adapt(source, source.companions) if adapt else (source.companions, [])
    count = write_peft(folder, source, str(base.resolve()) if base else source.location, companions)
    notices = [*source.notices, *more, describe(config.lora)]
    if (reason := unlike_over_transformers_5(config)) is not None:
        notices.append(
            f"peft over transformers 5 does not open this folder as it is: {reason}. Merged, it does not matter"
        )
    return Converted(folder, None, count, trained_count(config), tuple(notices), what="PEFT folder")


def describe_merge(source: TensorSource) -> list[str]:
    """A notice about the adapters that are merged into a source's weights; none without adapters."""
    return [] if source.config.lora is None else [f"merged into the weights: {describe(source.config.lora)}"]


def describe(lora: Lora) -> str:
    """Adapters in words."""
    return f"{lora.kind} adapters of rank {lora.r}, alpha {lora.lora_alpha:g}, on {lora.modules}"
