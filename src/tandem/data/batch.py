"""Samples and micro-batches: what a backend gets from the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tandem.errors import UserError

IGNORE = -100  # a label that is not trained

# What a document of preference data is: an answer that is not wanted, one that is, or an answer to another prompt.
REJECTED, CHOSEN, MISMATCHED = 0, 1, 2


@dataclass(frozen=True)
class Answers:
    """What is known of documents that are answers to compare.

    Attributes:
        roles: REJECTED, CHOSEN or MISMATCHED, int8 [documents].
        reference: sum of log p(label) under the weights that the model is compared with, float64 [documents]. NaN
            where it is not known.
    """

    roles: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One training sample, without padding.

    Attributes:
        tokens: int32 [t].
        labels: int32 [t], already shifted: `labels[i]` is what position `i` must predict, or IGNORE.
        position_ids: int32 [t].
        lengths: number of tokens of each document in the sample, in order; the sum is t. A token attends to itself
            and to the earlier tokens of its document.
        answers: what the documents of preference data are; None for other data.
    """

    tokens: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    lengths: tuple[int, ...]
    answers: Answers | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Documents laid end to end, without padding (Megatron's `thd` form).

    Attributes:
        tokens, labels, position_ids: int32 [t], as in `Sample`.
        cu_seqlens: int32 [documents + 1], from 0 to t: where each document begins, and the end of the last.
        answers: as in `Sample`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    answers: Answers | None = field(default=None, kw_only=True)

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))

    @property
    def judged(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions whose labels count, and these labels."""
        rows = np.flatnonzero(self.labels != IGNORE)
        return rows, self.labels[rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents]."""
        return np.diff(self.cu_seqlens)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError when a token or a trained label is not in 0 .. `vocab_size` - 1."""
        for name, ids in (("tokens", self.tokens), ("labels", self.judged[1])):
            if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
                raise UserError(
                    f"{name} of a micro-batch span {ids.min()}..{ids.max()}, but the model's vocabulary is "
                    f"0..{vocab_size - 1}; if the data was made with another tokenizer, preprocess it again"
                )


@dataclass(frozen=True)
class AskedBatch(MicroBatch):
    """A micro-batch with labels of its own, of which a position can have several. `labels` are all IGNORE.

    Attributes:
        rows: int64 [n], positions in the batch.
        row_labels: int32 [n], what each of them shall predict.
    """

    rows: np.ndarray
    row_labels: np.ndarray

    @classmethod
    def of(cls, batch: MicroBatch, rows: np.ndarray, row_labels: np.ndarray) -> AskedBatch:
        """The tokens of a batch, with other labels."""
        unlabelled = np.full_like(batch.labels, IGNORE)
        return cls(batch.tokens, unlabelled, batch.position_ids, batch.cu_seqlens, rows, row_labels)

    @property
    def trained_tokens(self) -> int:
        return len(self.rows)

    @property
    def judged(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rows, self.row_labels


def join(samples: Sequence[Sample]) -> Sample:
    """One sample of several, laid end to end. Their documents stay separate."""
    if len(samples) == 1:
        return samples[0]
    return Sample(
        tokens=np.concatenate([sample.tokens for sample in samples]),
        labels=np.concatenate([sample.labels for sample in samples]),
        position_ids=np.concatenate([sample.position_ids for sample in samples]),
        lengths=tuple(length for sample in samples for length in sample.lengths),
        answers=_joined([sample.answers for sample in samples]),
    )


def _joined(parts: Sequence[Answers | None]) -> Answers | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    assert len(known) == len(parts), "samples of one batch are of one kind"
    roles, reference = ([getattr(part, name) for part in known] for name in ("roles", "reference"))
    return Answers(np.concatenate(roles), np.concatenate(reference))


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """One micro-batch of several samples, laid end to end. Their documents stay separate.

    >>> sample = Sample(np.array([5, 6, 7]), np.array([6, 7, 8]), np.arange(3), lengths=(3,))
    >>> collate([sample, sample]).cu_seqlens
    array([0, 3, 6], dtype=int32)
    """
    joined = join(samples)
    return MicroBatch(
        tokens=joined.tokens.astype(np.int32, copy=False),
        labels=joined.labels.astype(np.int32, copy=False),
        position_ids=joined.position_ids.astype(np.int32, copy=False),
        cu_seqlens=np.cumsum([0, *joined.lengths], dtype=np.int32),
        answers=joined.answers,
    )


def documents_of(batch: MicroBatch, kept: np.ndarray) -> tuple[MicroBatch, np.ndarray]:
    """Some documents of a batch, without `answers`, and which tokens these are, bool [t].

    Args:
        kept: bool [documents].
    """
    tokens = np.repeat(kept, batch.lengths)
    ends = np.cumsum([0, *batch.lengths[kept]], dtype=np.int32)
    return MicroBatch(batch.tokens[tokens], batch.labels[tokens], batch.position_ids[tokens], ends), tokens


def padded(batch: MicroBatch, multiple: int) -> MicroBatch:
    """The batch with a document without labels at its end, which makes its length a multiple of `multiple`."""
    missing = -len(batch.tokens) % multiple
    if not missing:
        return batch
    padding = np.arange(missing, dtype=np.int32)
    return MicroBatch(
        tokens=np.concatenate([batch.tokens, np.zeros_like(padding)]),
        labels=np.concatenate([batch.labels, np.full_like(padding, IGNORE)]),
        position_ids=np.concatenate([batch.position_ids, padding]),
        cu_seqlens=np.append(batch.cu_seqlens, batch.cu_seqlens[-1] + missing).astype(np.int32),
    )
