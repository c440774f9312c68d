"""Single stored conversations, from `{prefix}_packed_{input_ids,attention_mask,labels}_document`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from tandem.data.batch import IGNORE, Sample
from tandem.data.datasets.sample_index import (
    EmptySplitError,
    advice_for_empty_split,
    share_name,
    split_position,
    split_weights,
)
from tandem.data.datasets.segments import lengths_from_ends, restarting_positions
from tandem.data.indexed import IndexedDataset
from tandem.data.kinds import CONVERSATIONS
from tandem.data.templates.truncation import TurnLengths, header_length, kept_tokens
from tandem.errors import UserError


class SFTSequences:
    """The stored sequences of a split. Each can be read as a sample.

    Whatever follows the last trained token of a sequence, such as padding, is left out: it has no effect on the loss.
    Each segment of a neat-packed sequence is a document, with positions from 0. Any other sequence is one document.

    Args:
        prefix: the output prefix of preprocessing.
        split_name, split: which share of the sequences: `"train"` of `"98,1,1"`.
        seq_length: longest sample; longer ones are cut turn by turn (see `tandem.data.templates.truncation`).
        eod_token: id that ends a document; needed by the two flags below.
        header: ids with which the header of an answer begins. A prompt that is cut keeps its header.
        reset_position_ids: in a plainly packed sequence, positions restart after each `eod_token`.
        reset_attention_mask: in a plainly packed sequence, each `eod_token` ends a document.

    Attributes:
        ids: numbers of the sequences of the split.
        lengths: int32 [len(ids)], number of tokens of each, including padding and what is cut.

    Raises:
        UserError: the files do not belong together, or the split is empty. On reading: `eod_token` also occurs in a
            prompt, so a reset would separate the prompt from its answer.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        split_name: str,
        split: str,
        seq_length: int,
        eod_token: int | None = None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        header: Sequence[int] = (),
    ) -> None:
        if eod_token is None and (reset_position_ids or reset_attention_mask):
            raise UserError(
                "--reset-position-ids and --reset-attention-mask need the token that ends a document: give "
                "--tokenizer-name-or-path, the folder of a tokenizer that names its eos_token"
            )
        self._prefix = os.fspath(prefix)
        self._ids, self._mask, self._labels = (
            IndexedDataset(CONVERSATIONS.pair(self._prefix, key)) for key in CONVERSATIONS.keys
        )
        for other in (self._mask, self._labels):
            if not np.array_equal(self._ids.lengths, other.lengths):
                raise UserError(f"{other.prefix}: sequence lengths differ from {self._ids.prefix}; preprocess again")
        self.seq_length = seq_length
        self._eod_token, self._header = eod_token, header
        self._reset_position_ids = reset_position_ids
        self._reset_attention_mask = reset_attention_mask
        self.ids = split_ids(self._prefix, split, split_name, len(self._ids))
        self.lengths = self._ids.lengths[self.ids.start : self.ids.stop]
        empty = np.flatnonzero(self.lengths == 0)
        if len(empty):
            raise UserError(
                f"{self._ids.prefix}: {len(empty)} sequences are empty, the first is number {self.ids[empty[0]]}; "
                f"make data without them, as `tandem preprocess` does"
            )

    def sample(self, sequence: int) -> Sample:
        """Sequence number `sequence`, with at most `seq_length` positions."""
        ids, labels, segments = self._read(sequence)
        lengths = lengths_from_ends(np.append(segments[1:] != segments[:-1], False))
        position_ids = restarting_positions(lengths)
        borders_are_stored = bool((self._mask[sequence] != 1).any())  # a neat-packed row ends in padding, 0
        if not borders_are_stored and (self._reset_attention_mask or self._reset_position_ids):
            is_eod = ids == self._eod_token
            self._check_eods(is_eod, labels)
            documents = lengths_from_ends(is_eod)
            lengths = documents if self._reset_attention_mask else lengths
            position_ids = restarting_positions(documents) if self._reset_position_ids else position_ids
        return Sample(ids, shifted(labels, lengths), position_ids, lengths)

    def _read(self, sequence: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels (unshifted) and segment numbers of a sequence, each int32 [t <= seq_length]."""
        ids, labels, segments = (
            dataset[sequence].astype(np.int32, copy=False) for dataset in (self._ids, self._labels, self._mask)
        )
        trained = np.flatnonzero(labels != IGNORE)
        kept = slice(0, trained[-1] + 1 if len(trained) else None)
        ids, labels, segments = ids[kept], labels[kept], segments[kept]
        if len(ids) > self.seq_length:
            keep = _kept(ids, labels, self.seq_length, self._header)
            ids, labels, segments = ids[keep], labels[keep], segments[keep]
        return ids, labels, segments

    def _check_eods(self, is_eod: np.ndarray, labels: np.ndarray) -> None:
        inside_prompt = np.flatnonzero(is_eod & (labels == IGNORE))
        if len(inside_prompt):
            raise UserError(
                f"{self._prefix}: token {self._eod_token} ends prompts as well as answers (position "
                f"{inside_prompt[0]}). So --reset-attention-mask and --reset-position-ids would separate prompts from "
                f"their answers; leave both out, or preprocess with --neat-pack, which stores where samples begin"
            )


def split_ids(prefix: str, split: str, split_name: str, sequences: int) -> range:
    """Sequence ids of a split. Each share is rounded; the rounding error moves the border after the first share.

    Source: Megatron's legacy `get_train_valid_test_split_`, which upstream uses for fine-tuning.

    Raises:
        EmptySplitError: the split has none.
    """
    position = split_position(split_name)
    bounds = [0, *accumulate(round(weight * sequences) for weight in split_weights(split))]
    excess = bounds[-1] - sequences
    bounds = [0, *(bound - excess for bound in bounds[1:])]
    ids = range(bounds[position], bounds[position + 1])
    if not ids:
        raise EmptySplitError(
            f"{prefix}: {share_name(split_name, split)} holds none of its {sequences} sequences; "
            f"{advice_for_empty_split(split_name, split)}"
        )
    return ids


def _kept(ids: np.ndarray, labels: np.ndarray, seq_length: int, header: Sequence[int]) -> np.ndarray:
    """Which tokens are kept of a sequence that is cut to `seq_length`, bool [t].

    A turn is a run of tokens that are not trained, and the run of trained tokens after it.
    """
    trained = labels != IGNORE
    starts = np.flatnonzero(~trained & np.append(True, trained[:-1]))
    if trained[0]:
        starts = np.append(0, starts)
    turns = []
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(labels)]):
        target = int(np.count_nonzero(trained[begin:end]))
        source = end - begin - target
        turns.append(TurnLengths(source, target, header_length(ids[begin : begin + source], header)))
    return kept_tokens(turns, seq_length)[0]


def shifted(labels: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Labels [t] moved to the positions that predict them. The last position of a document predicts nothing."""
    moved = np.append(labels[1:], np.int32(IGNORE))
    moved[np.cumsum(lengths) - 1] = IGNORE
    return moved
