"""Helpers for large arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tandem.checkpoints.formats.arrays import STRIPE, transposed


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(0, 3), (1, 8), (8, 1), (7, 5), (36, 5), (2 * STRIPE + 4, 33), (STRIPE, 64)])
def test_transposed(shape: tuple[int, int], dtype: type) -> None:
    matrix = np.arange(shape[0] * shape[1]).reshape(shape).astype(dtype)
    for given in (matrix, np.concatenate([matrix, matrix], axis=1)[:, : shape[1]], matrix[::-1]):
        result = transposed(given)
        assert result.flags.c_contiguous
        assert result.dtype == given.dtype
        np.testing.assert_array_equal(result, given.T)
