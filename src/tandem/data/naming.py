"""Names of a dataset's files, as upstream gives them."""

from __future__ import annotations

SFT_KEYS = ("input_ids", "attention_mask", "labels")
PAIR_KEYS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def text_prefix(output_prefix: str, key: str) -> str:
    """Prefix of the `.bin/.idx` pair of one json key of plain text."""
    return f"{output_prefix}_{key}_document"


def sft_prefix(output_prefix: str, key: str) -> str:
    """Prefix of the pair of one of `SFT_KEYS` or `PAIR_KEYS`; "packed" stands there with and without packing."""
    return f"{output_prefix}_packed_{key}_document"
