"""Packing several samples into a row: the same bytes as `--pack` and `--neat-pack` upstream."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from tandem.data.batch import IGNORE


def greedy_knapsack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the samples of each row. Each sample is in exactly one row.

    A row takes the longest sample that still fits, until none fits; of equally long samples it takes the last.

    >>> greedy_knapsack([3, 5, 2, 7], capacity=8)
    [[3], [1, 0], [2]]

    Source: `greedy_knapsack` of LLaMA-Factory and MindSpeed-LLM. Here each distinct length is searched once, not each
    sample.
    """
    samples_of: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        samples_of[length].append(index)
    distinct = sorted(samples_of)
    assert not distinct or distinct[-1] <= capacity
    rows = []
    while distinct:
        row, room = [], capacity
        while (longest := bisect_right(distinct, room) - 1) >= 0:
            length = distinct[longest]
            row.append(samples_of[length].pop())
            room -= length
            if not samples_of[length]:
                del distinct[longest]
        rows.append(row)
    return rows


class Sequences(Protocol):
    """Sequences by number, such as an `IndexedDataset`."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


def packed_rows(
    input_ids: Sequences, labels: Sequences, seq_length: int, pad_id: int, neat: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Rows `{input_ids, attention_mask, labels}`, each int32 [seq_length].

    At least one position of a row is padding, as upstream has it. The mask is 1 everywhere. With `neat` it is the
    number of the sample in its row: 1, 2, .., and 0 on padding.
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
