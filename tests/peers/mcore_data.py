"""A corpus in our files, and Megatron-core's own datasets over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tandem.data.indexed import IndexedWriter

EOD = 0
SPLIT = "80,15,5"
SEQUENCE, SEED = 24, 1234
FLAGS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def corpus(prefix: Path, documents: int, vocab_size: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, "uint16") as writer:
        for length in random.integers(1, 60, documents):
            writer.add_document([*random.integers(1, vocab_size, length).tolist(), EOD])
    return str(prefix)


def megatron_datasets(
    prefixes: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None = None, flags: bool = False
) -> list[Any]:
    """Train, valid and test; the builder keeps its indices next to the files."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE,
        blend=(prefixes, weights),
        split=SPLIT,
        tokenizer=SimpleNamespace(eod=EOD, pad=-1, vocab_size=None, unique_identifiers={}),
        **dict.fromkeys(FLAGS, flags),
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
