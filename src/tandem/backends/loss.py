"""What the losses of both frameworks share: rows in chunks, and weights of rows."""

from __future__ import annotations

import numpy as np


def chunks(rows: int, vocabulary: int, most_bytes: int) -> list[slice]:
    """Even parts of range(rows), of which each one's fp32 logits fit `most_bytes`; none of no rows. So the logits of a
    long batch never exist at once."""
    largest = max(1, most_bytes // (4 * vocabulary))
    count = -(-rows // largest)
    return [slice(rows * part // count, rows * (part + 1) // count) for part in range(count)]


def split_scale(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Weights as one factor times shares between -1 and 1, which keep their digits in fp16. Equal weights have shares
    of exactly 1."""
    scale = float(np.abs(weights).max(initial=0.0)) or 1.0
    return scale, weights / scale
