"""`copy(source, sink)`: every conversion, export and re-sharding is this one act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tandem.checkpoints.arrays import is_finite
from tandem.checkpoints.interface import Kind, TensorSink, TensorSource
from tandem.checkpoints.publish import final_place
from tandem.errors import UserError
from tandem.models.tensors import tensor_table

# called after each tensor with the bytes read so far and in all
Progress = Callable[[int, int], None]


def copy(
    source: TensorSource, sink: TensorSink, kinds: tuple[Kind, ...] = ("model",), progress: Progress | None = None
) -> None:
    """Move every tensor of `kinds` from source to sink, in turn; the sink appears whole or not at all.

    Raises:
        UserError: a tensor holds NaN or infinity, or source or sink refuse it.
    """
    table = tensor_table(source.config)
    total = sum(spec.numel * source.dtype(name, kind).itemsize for kind in kinds for name, spec in table.items())
    done = 0
    try:
        for kind, name, tensor in _read_ahead(source, [(kind, name) for kind in kinds for name in table]):
            sink.write(name, tensor, kind)
            done += tensor.nbytes
            if progress:
                progress(done, total)
        sink.close()
    except OSError as error:
        sink.abort()
        what = final_place(error.filename) if error.filename else "writing failed"
        raise UserError(
            f"from {source.location} to {final_place(sink.location)}: {what}: {error.strerror}; nothing of it was kept"
        ) from error
    except BaseException:
        sink.abort()
        raise


def _read_ahead(source: TensorSource, items: Sequence[tuple[Kind, str]]) -> Iterator[tuple[Kind, str, np.ndarray]]:
    """Read and check each tensor while the one before it is being written."""
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(_read, source, *item) for item in items[:1]]
        for (kind, name), following in zip(items, [*items[1:], None]):
            tensor = ahead.pop().result()
            if following:
                ahead.append(reader.submit(_read, source, *following))
            yield kind, name, tensor


def _read(source: TensorSource, kind: Kind, name: str) -> np.ndarray:
    tensor = source.read(name, kind)
    if not is_finite(tensor):
        raise UserError(f"{source.location}: tensor {name} holds NaN or infinity")
    return tensor
