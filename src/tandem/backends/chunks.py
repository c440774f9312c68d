"""The output head's rows in chunks, so that the logits of a long batch never exist at once."""

from __future__ import annotations


def chunks(rows: int, vocabulary: int, most_bytes: int) -> list[slice]:
    """Even parts of range(rows), of which each one's fp32 logits fit `most_bytes`; none of no rows."""
    largest = max(1, most_bytes // (4 * vocabulary))
    count = -(-rows // largest)
    return [slice(rows * part // count, rows * (part + 1) // count) for part in range(count)]
