"""`copy(source, sink)`: every conversion, export and re-sharding is this one act."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tandem.checkpoints.interface import Kind, TensorSink, TensorSource
from tandem.errors import UserError
from tandem.models.tensors import tensor_table

# called after each tensor with the bytes read so far and in all
Progress = Callable[[int, int], None]


def copy(
    source: TensorSource, sink: TensorSink, kinds: tuple[Kind, ...] = ("model",), progress: Progress | None = None
) -> None:
    """Move every tensor of `kinds` from source to sink, one at a time; the sink appears whole or not at all.

    Raises:
        UserError: a tensor holds NaN or infinity, or source or sink refuse it.
    """
    table = tensor_table(source.config)
    total = sum(spec.numel * source.dtype(name, kind).itemsize for kind in kinds for name, spec in table.items())
    done = 0
    try:
        for kind in kinds:
            for name in table:
                tensor = source.read(name, kind)
                check_finite(source.location, name, tensor)
                sink.write(name, tensor, kind)
                done += tensor.nbytes
                if progress:
                    progress(done, total)
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
