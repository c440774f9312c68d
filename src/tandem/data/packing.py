"""Packing: which samples share a row, and the rows themselves, byte for byte as `--pack` and `--neat-pack` upstream."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from tandem.data.batch import IGNORE


def greedy_knapsack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the samples of each row: the longest that still fits, again and again; of equals the last.

    Every sample lands in exactly one row. Source: `greedy_knapsack` of LLaMA-Factory and MindSpeed-LLM; here each
    distinct length is searched once, not each sample.
    """
    samples_of: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        samples_of[length].append(index)
    distinct = sorted(samples_of)
    assert not distinct or distinct[-1] <= capacity
    rows = []
    while distinct:
        row, room = [], capacity
        while (found := bisect_right(distinct, room) - 1) >= 0:
            length = distinct[found]
            row.append(samples_of[length].pop())
            room -= length
            if not samples_of[length]:
                del distinct[found]
        rows.append(row)
    return rows


class Sequences(Protocol):
    """As `IndexedDataset`."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


def packed_rows(
    input_ids: Sequences, labels: Sequences, seq_length: int, pad_id: int, neat: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Rows `{input_ids, attention_mask, labels}`, each int32 [seq_length].

    At least one position of a row is padding, as upstream reserves it. The mask is 1 everywhere, or with `neat` the
    number 1, 2, .. of the sample and 0 on padding.
    """
    for row in greedy_knapsack(input_ids.lengths.tolist(), seq_length - 1):
        lengths = input_ids.lengths[row]
        segments = np.repeat(np.arange(1, len(row) + 1), lengths)
        yield {
            "input_ids": _padded([input_ids[i] for i in row], seq_length, pad_id),
            "attention_mask": _padded([segments], seq_length, 0) if neat else np.ones(seq_length, np.int32),
            "labels": _padded([labels[i] for i in row], seq_length, IGNORE),
        }


def _padded(pieces: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    padded = np.full(length, fill, np.int32)
    joined = np.concatenate(pieces)
    padded[: len(joined)] = joined
    return padded
