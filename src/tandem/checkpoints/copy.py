"""`copy(source, sink)`: every conversion, export and re-sharding is one such copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.interface import TensorKind, TensorSink, TensorSource
from tandem.errors import UserError
from tandem.files.publish import final_place
from tandem.models.tensors import tensor_table
from tandem.parallel.slices import Part

# Blocks, and their bytes, that may be read before they are written: reading goes on while a write waits for the disk.
AHEAD = 8
AHEAD_BYTES = 32 << 20

# called after each block with the bytes read so far and in all
Progress = Callable[[int, int], None]
# the next rows of a tensor
Block = tuple[TensorKind, str, np.ndarray]


def copy(
    source: TensorSource, sink: TensorSink, kinds: tuple[TensorKind, ...] = ("model",), progress: Progress | None = None
) -> None:
    """Copy every tensor of `kinds` from source to sink, one after another. The sink appears whole or not at all.

    Raises:
        UserError: a tensor holds NaN or infinity, or the source or the sink fails.
    """
    table = tensor_table(source.config)
    total = sum(spec.numel * source.dtype(name, kind).itemsize for kind in kinds for name, spec in table.items())
    done = 0
    try:
        for kind, name, rows in _read_ahead(_checked(source, [(kind, name) for kind in kinds for name in table])):
            sink.write(name, rows, kind)
            done += rows.nbytes
            if progress:
                progress(done, total)
        sink.close()
    except OSError as error:
        sink.abort()
        cause = final_place(error.filename) if error.filename else "writing failed"
        raise UserError(
            f"from {source.location} to {final_place(sink.location)}: {cause}: {error.strerror}; nothing was kept"
        ) from error
    except BaseException:
        sink.abort()
        raise


def _checked(source: TensorSource, items: Sequence[tuple[TensorKind, str]]) -> Iterator[Block]:
    table = tensor_table(source.config)
    for kind, name in items:
        for rows in source.stream(name, Part.whole(table[name].shape), kind):
            if not is_finite(rows):
                raise UserError(f"{source.location}: tensor {name} holds NaN or infinity")
            yield kind, name, rows


def _read_ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """Read and check blocks while earlier ones are written. Those of a source of whole tensors may be large."""
    largest = 1
    with ThreadPoolExecutor(1) as reader:
        ahead = deque([reader.submit(next, blocks, None)])
        while block := ahead.popleft().result():
            largest = max(largest, block[2].nbytes)
            while len(ahead) < max(min(AHEAD, AHEAD_BYTES // largest), 1):
                ahead.append(reader.submit(next, blocks, None))
            yield block
