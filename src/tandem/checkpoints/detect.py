"""Recognise what a folder holds."""

from __future__ import annotations

from pathlib import Path

from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.hf import HFSource
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.megatron import FILE, MegatronSource, is_megatron
from tandem.checkpoints.native import INDEX, NativeSource
from tandem.errors import UserError


def open_source(folder: str | Path, iteration: int | None = None) -> TensorSource:
    """Recognise what a folder holds, and open it.

    Raises:
        UserError: it is missing, or is neither a Hugging Face folder nor a checkpoint.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: expected a Hugging Face folder or a checkpoint folder")
    if (folder / "config.json").exists():
        return HFSource(folder)
    if (find_iteration(folder, iteration) / INDEX).exists():
        return NativeSource(folder, iteration)
    if is_megatron(folder, iteration):
        return MegatronSource(folder, iteration)
    raise UserError(
        f"{find_iteration(folder, iteration)} holds neither {INDEX} (native) nor mp_rank_*/{FILE} (Megatron torch)"
    )
