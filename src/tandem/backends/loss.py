"""What the losses of both frameworks share: chunks of rows, and weights of rows."""

from __future__ import annotations

import numpy as np


def chunks(rows: int, vocabulary: int, most_bytes: int) -> list[slice]:
    """Even parts of range(rows), so small that the fp32 logits of a part fit into `most_bytes`; none for no rows.

    So the logits of a long batch never exist at once.

    >>> chunks(10, vocabulary=100, most_bytes=1600)
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    largest = max(1, most_bytes // (4 * vocabulary))
    count = -(-rows // largest)
    return [slice(rows * part // count, rows * (part + 1) // count) for part in range(count)]


def split_scale(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Weights as one factor times shares between -1 and 1, which keep their digits in fp16.

    Shares of equal weights are exactly 1.

    >>> split_scale(np.array([0.002, 0.001]))
    (0.002, array([1. , 0.5]))
    """
    scale = float(np.abs(weights).max(initial=0.0)) or 1.0
    return scale, weights / scale
