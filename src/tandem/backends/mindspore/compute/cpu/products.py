"""Products of matrices on CPU, by NumPy's BLAS, into memory of MindSpore's pool.

MindSpore 2.10's own (`ops.MatMul`, `ops.BatchMatMul`, `mint.matmul`) lose about 1.4 kB with each call, so that a run
grows without end. They are also slower here: `benchmarks/mindspore_products.py` compares.
"""

from __future__ import annotations

import time

import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.weight import empty

FEW_ROWS = 4

LINEAR, ATTENTION = "linear layers, head", "attention"
# Seconds that products took so far, by module. MindSpore's profiler does not see them.
seconds = {LINEAR: 0.0, ATTENTION: 0.0}


def matmul(a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """The product of two fp32 matrices, or of each pair in two stacks of matrices."""
    start = time.perf_counter()
    left, right = a.asnumpy(), b.asnumpy()
    if transpose_a:
        left = left.swapaxes(-1, -2)
    if transpose_b:
        right = right.swapaxes(-1, -2)
    result, values = empty(*left.shape[:-1], right.shape[-1])
    if left.ndim == 2 and 1 < len(left) <= FEW_ROWS:
        # One product of a matrix and a vector after the other: BLAS's product of matrices would copy `right` first.
        for row, out in zip(left, values):
            np.matmul(row, right, out=out)
    else:
        np.matmul(left, right, out=values)
    seconds[LINEAR if values.ndim == 2 else ATTENTION] += time.perf_counter() - start
    return result
