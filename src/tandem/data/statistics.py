"""What is in a preprocessed dataset: counts, lengths, and samples as text in which one sees what is trained."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedDataset
from tandem.data.naming import sft_prefix
from tandem.data.tokenizer import Tokenizer

_BINS = 12


@dataclass(frozen=True)
class Statistics:
    """Counts of a dataset.

    Attributes:
        sequences: stored; packed rows count once.
        documents: in them, when the rows are neat-packed; else `sequences`.
        tokens: without the padding of packed rows.
        trained_tokens: those with a label; of plain text all.
        fill_rate: tokens / stored positions.
        histogram: (shortest, longest, sequences) of each class of lengths.
    """

    sequences: int
    documents: int
    tokens: int
    trained_tokens: int
    fill_rate: float
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Span:
    """Text of one sample that is trained throughout, or not at all."""

    text: str
    trained: bool


class DataView:
    """A dataset by its data path: a `.bin/.idx` pair of plain text, or the output prefix of conversations."""

    def __init__(self, data_path: str | os.PathLike[str]) -> None:
        self.data_path = os.fspath(data_path)
        self.is_instruction_dataset = Path(f"{sft_prefix(self.data_path, 'input_ids')}.idx").exists()
        if self.is_instruction_dataset:
            keys = ("input_ids", "labels", "attention_mask")
            self._ids, self._labels, self._mask = (IndexedDataset(sft_prefix(self.data_path, key)) for key in keys)
        else:
            self._ids = IndexedDataset(self.data_path)

    def __len__(self) -> int:
        return len(self._ids)

    def spans(self, index: int, tokenizer: Tokenizer) -> list[Span]:
        """Sequence `index` decoded; without the padding at its end."""
        ids = self._ids[index]
        if not self.is_instruction_dataset:
            return [Span(tokenizer.decode(ids.tolist()), True)]
        trained = self._labels[index] != IGNORE
        stop = self._unpadded_length(index)
        runs = groupby(range(stop), key=lambda position: bool(trained[position]))
        return [Span(tokenizer.decode(ids[list(positions)].tolist()), is_trained) for is_trained, positions in runs]

    def statistics(self) -> Statistics:
        """One pass over the data, in little memory."""
        stored = self._ids.num_tokens
        tokens = trained = stored
        documents = len(self)
        if self.is_instruction_dataset:
            tokens = trained = documents = 0
            for index in range(len(self)):
                tokens += self._unpadded_length(index)
                trained += int(np.count_nonzero(self._labels[index] != IGNORE))
                documents += int(self._mask[index].max(initial=1))
        lengths = self._ids.lengths
        return Statistics(len(self), documents, tokens, trained, tokens / max(1, stored), _histogram(lengths))

    def _unpadded_length(self, index: int) -> int:
        """Up to the last token that is trained; the stored length where none is. Padding is never trained."""
        trained = np.flatnonzero(self._labels[index] != IGNORE)
        return int(trained[-1]) + 1 if len(trained) else len(self._labels[index])


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    if not len(lengths):
        return []
    edges = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, _BINS + 1).astype(np.int64))
    edges = np.array([lengths.min(), lengths.max() + 1]) if len(edges) < 2 else edges
    edges[0] = lengths.min()
    counts, _ = np.histogram(lengths, edges)
    bounds = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist())
    return [(first, last - 1, count) for first, last, count in bounds]
