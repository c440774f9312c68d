"""Recognise what a folder holds."""

from __future__ import annotations

from pathlib import Path

from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.hf.source import HFSource
from tandem.checkpoints.interface import TensorSource, check_recorded
from tandem.checkpoints.megatron.names import FILE
from tandem.checkpoints.megatron.source import MegatronSource, is_megatron
from tandem.checkpoints.native.format import INDEX
from tandem.checkpoints.native.source import NativeSource
from tandem.errors import UserError
from tandem.files.publish import recover
from tandem.models.config import ModelConfig


def open_source(
    folder: str | Path,
    iteration: int | None = None,
    *,
    config: ModelConfig | None = None,
    noop_layers: tuple[int, ...] | None = None,
    num_layer_list: tuple[int, ...] | None = None,
) -> TensorSource:
    """Recognise what a folder holds, and open it.

    Args:
        config, noop_layers, num_layer_list: facts that a Megatron `torch` checkpoint may not record.

    Raises:
        UserError: the folder is missing, is neither a Hugging Face folder nor a checkpoint, or contradicts these facts.
    """
    folder = Path(folder)
    recover(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: expected a Hugging Face folder or a checkpoint folder")
    if (folder / "config.json").exists():
        if iteration is not None:
            raise UserError(
                f"{folder} is a Hugging Face folder, which has no iteration {iteration}: leave out --ckpt-step"
            )
        return HFSource(folder)
    return open_iteration(folder, iteration, config=config, noop_layers=noop_layers, num_layer_list=num_layer_list)


def open_iteration(
    folder: str | Path,
    iteration: int | None = None,
    *,
    config: ModelConfig | None = None,
    noop_layers: tuple[int, ...] | None = None,
    num_layer_list: tuple[int, ...] | None = None,
) -> TensorSource:
    """Open an iteration of a checkpoint folder, in any format. Arguments and errors are as in `open_source`."""
    if is_megatron(folder, iteration):
        return MegatronSource(folder, iteration, config=config, noop_layers=noop_layers, num_layer_list=num_layer_list)
    if not (find_iteration(folder, iteration) / INDEX).exists():
        raise UserError(
            f"{find_iteration(folder, iteration)} holds neither {INDEX} (native) nor mp_rank_*/{FILE} (Megatron torch)"
        )
    source = NativeSource(folder, iteration)
    check_recorded("noop_layers", noop_layers, source.layout.noop_layers, source.location)
    check_recorded("num_layer_list", num_layer_list, source.layout.num_layer_list, source.location)
    return source
