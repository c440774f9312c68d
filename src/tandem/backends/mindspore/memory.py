"""Tensors with undefined contents."""

from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint


def undefined(shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
    """A tensor on the device, with undefined contents."""
    if _pool_gives_memory():
        return mint.empty(shape, dtype=dtype)
    return Tensor.from_numpy(np.empty(shape, ms.dtype_to_nptype(dtype)))


@functools.cache
def _pool_gives_memory() -> bool:
    """MindSpore 2.7 has this on Ascend only. NumPy's memory is slower, because it is mapped again every time."""
    try:
        mint.empty((1,), dtype=ms.float32)
    except RuntimeError:
        return False
    return True
