"""Names of a dataset's files, as upstream gives them."""

from __future__ import annotations

import os
from pathlib import Path

SFT_KEYS = ("input_ids", "attention_mask", "labels")
PAIR_KEYS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
REJECTS_SUFFIX = ".rejects.jsonl"  # beside the record: rows that could not be used
MOST_NAMES = 5  # of each kind, in an error


def text_prefix(output_prefix: str, key: str) -> str:
    """Prefix of the `.bin/.idx` pair of one json key of plain text."""
    return f"{output_prefix}_{key}_document"


def sft_prefix(output_prefix: str, key: str) -> str:
    """Prefix of the pair of one of `SFT_KEYS` or `PAIR_KEYS`; "packed" stands there with and without packing."""
    return f"{output_prefix}_packed_{key}_document"


def whole_of(prefix: str) -> str | None:
    """The output prefix of conversations or preferences of which `prefix` is but one pair; None if it is not."""
    for key in (*SFT_KEYS, *PAIR_KEYS):
        output_prefix = prefix.removesuffix(sft_prefix("", key))
        if output_prefix != prefix and os.path.exists(f"{prefix}.idx"):
            return output_prefix
    return None


def data_beside(prefix: str | os.PathLike[str]) -> str:
    """For an error about a missing dataset: the ones in its folder, as `--data-path` takes them; "" without any."""
    folder = Path(prefix).parent
    names = sorted(path.name.removesuffix(".idx") for path in folder.glob("*.idx"))
    first_key = sft_prefix("", SFT_KEYS[0])
    held = {
        "pretrain": [name for name in names if "_packed_" not in name],
        "finetune": [name.removesuffix(first_key) for name in names if name.endswith(first_key)],
    }
    said = [
        f"for `tandem {command}` {', '.join(str(folder / name) for name in found[:MOST_NAMES])}"
        for command, found in held.items()
        if found
    ]
    return f"; there is {' and '.join(said)}" if said else ""
