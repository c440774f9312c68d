"""What a preprocessed dataset holds: counts, lengths, and samples as text that shows what is trained."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedDataset
from tandem.data.kinds import Kind, dataset_of_pair, kind_of
from tandem.data.no_dataset import no_dataset
from tandem.data.record import record_of
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

_BINS = 12


@dataclass(frozen=True)
class Statistics:
    """Counts of a dataset.

    Attributes:
        sequences: stored sequences; a packed row counts once.
        documents: documents in neat-packed rows; else equal to `sequences`.
        tokens: tokens without the padding of packed rows.
        trained_tokens: tokens with a label; all tokens of plain text.
        fill_rate: tokens / stored positions.
        histogram: (shortest, longest, number of sequences) of each range of lengths.
    """

    sequences: int
    documents: int
    tokens: int
    trained_tokens: int
    fill_rate: float
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Span:
    """A piece of a sample's text: all of it is trained, or none of it."""

    text: str
    trained: bool


class DataView:
    """A dataset to look at. The two sequences of a preference count as two samples.

    Args:
        data_path: a `.bin/.idx` pair of plain text, or the output prefix of conversations or preferences.
        packed: whether rows may end in padding. None: as the record says.

    Attributes:
        kind: the kind of the data.

    Raises:
        UserError: the data path is one of several pairs that belong together, or there is no dataset.
    """

    def __init__(self, data_path: str | os.PathLike[str], packed: bool | None = None) -> None:
        self.data_path = os.fspath(data_path)
        if (dataset := dataset_of_pair(self.data_path)) is not None:
            raise UserError(f"{self.data_path}: only one of several files of a dataset; give {dataset} instead")
        kind = kind_of(self.data_path)
        if kind is None:
            raise no_dataset(self.data_path)
        self.kind = kind
        may_be_packed = _is_packed(self.data_path) if packed is None else packed
        self._columns = _stored_columns(self.data_path, self.kind, may_be_packed)
        self._numbers = {key: IndexedDataset(self.kind.pair(self.data_path, key)) for key in self.kind.numbers}

    def __len__(self) -> int:
        return sum(len(column.ids) for column in self._columns)

    def title(self, index: int) -> str:
        number, column = divmod(index, len(self._columns))
        numbers = "".join(f", {key} {int(values[number][0])}" for key, values in self._numbers.items())
        return f"sample {number} {self._columns[column].name}".rstrip() + numbers

    def spans(self, index: int, tokenizer: Tokenizer) -> list[Span]:
        """The text of sample `index`, without the padding at its end."""
        number, column_number = divmod(index, len(self._columns))
        column = self._columns[column_number]
        ids = column.ids[number]
        if column.labels is None:
            if ids.min(initial=0) < 0:
                raise UserError(f"{self.data_path}: these are labels, not tokens")
            return [Span(tokenizer.decode(ids.tolist()), True)]
        trained = column.labels[number] != IGNORE
        runs = groupby(range(column.unpadded_length(number)), key=lambda position: bool(trained[position]))
        return [Span(tokenizer.decode(ids[list(positions)].tolist()), is_trained) for is_trained, positions in runs]

    def statistics(self) -> Statistics:
        """The counts of the dataset. Reads all of it once, with little memory."""
        lengths = np.concatenate([column.ids.lengths for column in self._columns])
        stored = sum(column.ids.num_tokens for column in self._columns)
        documents, tokens, trained = (sum(counts) for counts in zip(*(column.counts() for column in self._columns)))
        return Statistics(len(self), documents, tokens, trained, tokens / max(1, stored), _histogram(lengths))


@dataclass(frozen=True)
class _Column:
    """Sequences, with labels if only a part is trained, and with segments (`mask`) if they may be packed."""

    name: str
    ids: IndexedDataset
    labels: IndexedDataset | None = None
    mask: IndexedDataset | None = None
    packed: bool = False

    def counts(self) -> tuple[int, int, int]:
        """Documents, tokens, trained tokens."""
        if self.labels is None:
            return len(self.ids), self.ids.num_tokens, self.ids.num_tokens
        documents = tokens = trained = 0
        for index in range(len(self.ids)):
            tokens += self.unpadded_length(index)
            trained += int(np.count_nonzero(self.labels[index] != IGNORE))
            documents += 1 if self.mask is None else int(self.mask[index].max(initial=1))
        return documents, tokens, trained

    def unpadded_length(self, index: int) -> int:
        """Length without padding, which only packed rows have.

        Padding is segment 0 where segments are stored; else all that follows the last trained token.
        """
        assert self.labels is not None
        if not self.packed:
            return len(self.labels[index])
        segments = self.mask[index] if self.mask is not None else np.ones(1)
        used = np.flatnonzero(segments if (segments != 1).any() else self.labels[index] != IGNORE)
        return int(used[-1]) + 1 if len(used) else len(self.labels[index])


def _is_packed(data_path: str) -> bool:
    """Whether the record says that rows are packed; without a record they may be."""
    record = record_of(data_path)
    return record is None or bool(record["options"]["pack"])


def _stored_columns(data_path: str, kind: Kind, packed: bool) -> list[_Column]:
    def stored(key: str) -> IndexedDataset:
        return IndexedDataset(kind.pair(data_path, key))

    if not kind.columns:
        return [_Column("", IndexedDataset(data_path))]
    return [
        _Column(
            columns.name,
            stored(columns.ids),
            stored(columns.labels),
            stored(columns.segments) if columns.segments else None,
            packed and columns.segments is not None,
        )
        for columns in kind.columns
    ]


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    if not len(lengths):
        return []
    edges = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, _BINS + 1).astype(np.int64))
    edges = np.array([lengths.min(), lengths.max() + 1]) if len(edges) < 2 else edges
    edges[0] = lengths.min()
    counts, _ = np.histogram(lengths, edges)
    bounds = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist())
    return [(first, last - 1, count) for first, last, count in bounds]
