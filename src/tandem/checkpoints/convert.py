"""`copy(source, sink)`: every conversion, export and re-sharding is this one act."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tandem.checkpoints.hf import INDEX as HF_INDEX
from tandem.checkpoints.hf import SINGLE, HFSource
from tandem.checkpoints.interface import Kind, TensorSink, TensorSource
from tandem.checkpoints.native import INDEX, NativeSource, iteration_folder, read_tracker
from tandem.errors import UserError
from tandem.models.tensors import tensor_table

# called after each tensor with its name and the bytes read for it
Progress = Callable[[str, int], None]


def copy(
    source: TensorSource, sink: TensorSink, kinds: tuple[Kind, ...] = ("model",), progress: Progress | None = None
) -> None:
    """Move every tensor of `kinds` from source to sink, one at a time; the sink appears whole or not at all.

    Raises:
        UserError: a tensor holds NaN or infinity, or source or sink refuse it.
    """
    try:
        for kind in kinds:
            for name in tensor_table(source.config):
                tensor = source.read(name, kind)
                check_finite(source.location, name, tensor)
                sink.write(name, tensor, kind)
                if progress:
                    progress(name, tensor.nbytes)
        sink.close()
    except BaseException:
        sink.abort()
        raise


def check_finite(where: str, name: str, tensor: np.ndarray) -> None:
    """Raise UserError when a tensor holds NaN or infinity. The exponent bits tell, without a copy in fp32."""
    bits, exponent = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80)}.get(
        tensor.dtype.name, (np.uint16, 0x7C00)
    )
    view = np.ascontiguousarray(tensor).view(bits)
    if view.size and bool(((view & bits(exponent)) == exponent).any()):
        raise UserError(f"{where}: tensor {name} holds NaN or infinity")


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
