"""What Ascend NPUs get from the host, and what they give back: one copy for each micro-batch, one read for each step.

Written from MindSpore's documentation; there was no NPU to run it on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from tandem.backends.mindspore.communication import Ranks
from tandem.models.config import ModelConfig
from tandem.models.rotary import cos_sin

END_OF_EXACT = 2**24  # fp32 has all whole numbers below it


def to_device(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """All arrays in one transfer, as fp32. Integers become int32 there, and other numbers stay fp32."""
    for name, array in arrays.items():
        if array.dtype.kind in "iu" and np.abs(array).max(initial=0) >= END_OF_EXACT:
            raise ValueError(f"{name}: a micro-batch has numbers from {END_OF_EXACT} on, which fp32 does not hold")
    sent = Tensor(np.concatenate([array.ravel().astype(np.float32) for array in arrays.values()]))
    there, place = {}, 0
    for name, array in arrays.items():
        part = sent[place : place + array.size]
        there[name] = part.astype(ms.int32) if array.dtype.kind in "iu" else part.reshape(array.shape)
        place += array.size
    return there


def angles(config: ModelConfig, positions: np.ndarray, on_device: Tensor, dtype: ms.Type) -> tuple[Tensor, Tensor]:
    """From a table on the device, which is as long as the model's positions, or a power of two beyond."""
    length = max(config.max_position_embeddings, 2 ** int(positions.max(initial=0)).bit_length())
    cos, sin = _angle_table(config, length, dtype)
    return mint.index_select(cos, 0, on_device), mint.index_select(sin, 0, on_device)


@lru_cache(maxsize=4)
def _angle_table(config: ModelConfig, length: int, dtype: ms.Type) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin(config, np.arange(length))
    return Tensor(cos).astype(dtype), Tensor(sin).astype(dtype)


def totals(ranks: Ranks, values: Sequence[Any]) -> list[float]:
    """The values of all ranks in one gathering, and read in one copy. The sums are made on the host."""
    parts = [
        value.astype(ms.float32).reshape(1) if isinstance(value, Tensor) else mint.full((1,), value, dtype=ms.float32)
        for value in values
    ]
    own = mint.cat(parts, 0)
    rows = own if ranks.group is None else mint.cat(ranks.gather(own), 0)
    return rows.asnumpy().astype(np.float64).reshape(-1, len(values)).sum(0).tolist()
