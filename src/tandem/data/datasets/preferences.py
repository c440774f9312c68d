"""Preferences in training order: answers to compare, each a document of its own with its prompt."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from tandem.data.batch import CHOSEN, IGNORE, MISMATCHED, REJECTED, Answers, Sample
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.epochs import EpochOrders
from tandem.data.datasets.segments import restarting_positions
from tandem.data.datasets.sequences import shifted, split_ids
from tandem.data.indexed import IndexedDataset
from tandem.data.kinds import PREFERENCES, UNPAIRED, Kind
from tandem.data.templates.truncation import TurnLengths, header_length, kept_tokens
from tandem.errors import UserError


class Document(NamedTuple):
    """A prompt with an answer: int32 [t]. Labels are not shifted, and IGNORE over the prompt."""

    ids: np.ndarray
    labels: np.ndarray

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        trained = np.flatnonzero(self.labels != IGNORE)
        return int(trained[0]) if len(trained) else len(self.labels)


class AnswersDataset(Dataset, ABC):
    """Preferences of one prefix. Each epoch has all of them, in a new random order.

    Documents of more than `seq_length` tokens are cut as in upstream: the answers of a sample to the same length.

    Args:
        prefix: the output prefix of preprocessing.
        split_name, split: which share of them: `"train"` of `"98,1,1"`.
        num_samples: how many samples the run needs, rounded up to whole epochs. None: one epoch.
        shuffle: False keeps the stored order.
        header: ids with which the header of an answer begins. A prompt that is cut keeps its header.
        references: `Answers.reference` of every stored sample, float64 [samples, documents], by prefix. A table is
            added for a new prefix, with NaN. A sample's is a view of its row.

    Raises:
        UserError: the files do not belong together, or the split is empty. On reading: an answer has no trained token.
    """

    kind: ClassVar[Kind]
    documents: ClassVar[int]  # of a sample

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        split_name: str,
        split: str,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        header: Sequence[int] = (),
        references: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self._files = {key: IndexedDataset(self.kind.pair(self.prefix, key)) for key in self.kind.keys}
        self._stored = stored = len(self._files[self.kind.keys[0]])
        for key, file in self._files.items():
            if len(file) != stored:
                raise UserError(f"{file.prefix}: {len(file)} sequences, and {key} needs {stored}; preprocess again")
        self._seq_length, self._header = seq_length, header
        self._ids = split_ids(self.prefix, split, split_name, stored)
        self._orders = EpochOrders(self._ids, seed, shuffle)
        self._epochs = 1 if num_samples is None else max(1, -(-num_samples // len(self._ids)))
        tables = {} if references is None else references
        self._references = tables.setdefault(self.prefix, np.full((stored, self.documents), np.nan))

    def __len__(self) -> int:
        return self._epochs * len(self._ids)

    def __getitem__(self, i: int) -> Sample:
        """Sample `i`, with at most `seq_length` positions in each document."""
        row = self._row(i)
        documents = self._cut(self._read(row))
        lengths = tuple(len(document.ids) for document in documents)
        if not all((document.labels != IGNORE).any() for document in documents):
            raise UserError(f"{self.origin(i)}: an answer without a trained token: preprocess again")
        labels = np.concatenate([document.labels for document in documents])
        return Sample(
            np.concatenate([document.ids for document in documents]),
            shifted(labels, lengths),
            restarting_positions(lengths),
            lengths,
            Answers(self._roles(row), self._references[row]),
        )

    def is_referred(self, i: int) -> bool:
        """Whether the reference of sample `i` is known."""
        return not np.isnan(self._references[self._row(i)]).any()

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files."""
        return f"{self.prefix}: {self.kind.name} {self._row(i)}"

    def describe(self) -> dict[str, int]:
        """Counts that a run shows at its start. The tokens are those of one epoch, before any cut."""
        part = slice(self._ids.start, self._ids.stop)
        lengths = [self._files[columns.ids].lengths[part] for columns in self.kind.columns]
        return {
            "sequences": len(self._ids),
            "tokens": int(sum(length.sum(dtype=np.int64) for length in lengths)),
            "samples_per_epoch": len(self._ids),
            "samples": len(self),
            "epochs": self._epochs,
        }

    @abstractmethod
    def _read(self, row: int) -> list[Document]: ...

    @abstractmethod
    def _roles(self, row: int) -> np.ndarray:
        """int8 [documents]"""

    def _row(self, i: int) -> int:
        epoch, position = divmod(range(len(self))[i], len(self._ids))
        return int(self._orders.order(epoch)[position])

    def _document(self, name: str, row: int) -> Document:
        """A stored document, up to its last trained token."""
        (columns,) = (columns for columns in self.kind.columns if columns.name == name)
        ids, labels = (self._files[key][row].astype(np.int32, copy=False) for key in (columns.ids, columns.labels))
        if len(ids) != len(labels):
            raise UserError(
                f"{self.prefix}: {name} {row} has {len(ids)} ids and {len(labels)} labels; preprocess again"
            )
        trained = np.flatnonzero(labels != IGNORE)
        end = trained[-1] + 1 if len(trained) else None
        return Document(ids[:end], labels[:end])

    def _cut(self, documents: list[Document]) -> list[Document]:
        """The documents with at most `seq_length` tokens."""
        if all(len(document.ids) <= self._seq_length for document in documents):
            return documents
        longest = max(len(document.ids) - document.prompt for document in documents)
        masks, kept = [], longest
        for document in documents:
            prompt = document.prompt
            turn = TurnLengths(prompt, longest, header_length(document.ids[:prompt], self._header))
            mask, _ = kept_tokens([turn], self._seq_length)
            masks.append(mask[: len(document.ids)])
            kept = min(kept, int(np.count_nonzero(mask[prompt:])))
        for document, mask in zip(documents, masks):
            mask[document.prompt + kept :] = False
        return [Document(document.ids[mask], document.labels[mask]) for document, mask in zip(documents, masks)]


class PairDataset(AnswersDataset):
    """Pairs: a sample has the chosen answer, and then the rejected one."""

    kind = PREFERENCES
    documents = 2

    def _read(self, row: int) -> list[Document]:
        return [self._document(columns.name, row) for columns in self.kind.columns]

    def _roles(self, row: int) -> np.ndarray:
        return np.array([CHOSEN, REJECTED], np.int8)


class UnpairedDataset(AnswersDataset):
    """Single answers, each desirable or not: a sample has one, and then its prompt with another prompt's answer.

    That is the answer stored before it; before the first is the last.

    Source: KTO (arXiv 2402.01306), section 4.1, which estimates a KL divergence with such mismatched answers.
    """

    kind = UNPAIRED
    documents = 2

    def _read(self, row: int) -> list[Document]:
        name = self.kind.columns[0].name
        answer, other = self._document(name, row), self._document(name, (row or self._stored) - 1)
        mismatched = (
            np.concatenate([mine[: answer.prompt], others[other.prompt :]]) for mine, others in zip(answer, other)
        )
        return [answer, Document(*mismatched)]

    def _roles(self, row: int) -> np.ndarray:
        (key,) = self.kind.numbers
        desirable = self._files[key][row].tolist()
        if desirable not in ([0], [1]):
            raise UserError(f"{self._files[key].prefix}: sequence {row} is {desirable}, expected 0 or 1")
        return np.array([CHOSEN if desirable == [1] else REJECTED, MISMATCHED], np.int8)
