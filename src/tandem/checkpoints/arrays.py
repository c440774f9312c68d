"""Checks of large arrays, in pieces that stay in the processor's cache: no copy of the whole is made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

PIECE = 1 << 17  # numbers at a time
# dtype -> its bits as integers, and the exponent's bits: all of them are set in NaN and infinity alone
EXPONENTS = {
    "float32": (np.uint32, 0x7F800000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}


def is_finite(tensor: np.ndarray) -> bool:
    """Whether no element is NaN or infinity."""
    bits, exponent = EXPONENTS[tensor.dtype.name]
    return all((piece & bits(exponent)).max() != exponent for piece in _pieces(tensor, bits))


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays of one dtype and shape are equal, bit for bit."""
    assert (left.dtype.name, left.shape) == (right.dtype.name, right.shape)
    return all(np.array_equal(a, b) for a, b in zip(_pieces(left, np.uint8), _pieces(right, np.uint8)))


def _pieces(tensor: np.ndarray, bits: type) -> Iterator[np.ndarray]:
    flat: np.ndarray = np.ascontiguousarray(tensor).reshape(-1).view(bits)
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]
