"""Recognise what a folder holds."""

from __future__ import annotations

from pathlib import Path

from tandem.checkpoints.hf import INDEX as HF_INDEX
from tandem.checkpoints.hf import SINGLE, HFSource
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.native import INDEX, NativeSource, iteration_folder, read_tracker
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
    found = iteration if iteration is not None else read_tracker(folder)
    if (iteration_folder(folder, found) / INDEX).exists():
        return NativeSource(folder, found)
    raise UserError(f"{folder} holds neither {SINGLE} or {HF_INDEX} with config.json, nor a native or torch checkpoint")
