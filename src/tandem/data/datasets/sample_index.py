"""Megatron's split and its document, sample and shuffle indices, entry for entry, in NumPy.

Source: `GPTDataset._build_document_sample_shuffle_indices` and `build_sample_idx` of Megatron-core 0.12.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from tandem.errors import UserError, nearest

SPLIT_NAMES = ["train", "valid", "test"]
_FINAL_EPOCH_THRESHOLD = 0.80  # a last epoch of which less is used is shuffled separately


class EmptySplitError(UserError):
    """A split has no sample."""


@dataclass(frozen=True)
class SampleIndex:
    """Where each sample is in a stream of shuffled documents.

    Attributes:
        document_index: int32 [epochs * sequences], sequence ids in stream order.
        sample_index: int32 [samples + 1, 2], where each sample begins: (position in document_index, token offset).
        shuffle_index: uint32 [samples], the order in which samples are read.
        epochs: how often the stream repeats each sequence.
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray
    epochs: int


def split_weights(split: str) -> list[float]:
    """Shares of train, valid and test in a `--split`; a share that is not given is 0.

    >>> split_weights("98,1,1")
    [0.98, 0.01, 0.01]
    """
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or not math.isfinite(sum(parts)) or sum(parts) == 0:
        raise UserError(f"split {split!r}: expected one to three numbers of 0 or more, not all 0, such as 98,1,1")
    parts += [0.0] * (3 - len(parts))
    return [part / sum(parts) for part in parts]


def share_name(split_name: str, split: str) -> str:
    """The name of a split in messages."""
    return "all of it" if _is_whole(split_name, split) else f"{split_name} of split {split}"


def advice_for_empty_split(split_name: str, split: str) -> str:
    """How to fix an empty split, for messages."""
    return "use more data" if _is_whole(split_name, split) else "use more data, or give it a larger weight in the split"


def _is_whole(split_name: str, split: str) -> bool:
    return split_weights(split)[split_position(split_name)] == 1


def split_position(split_name: str) -> int:
    """Position of a split name in `SPLIT_NAMES`; raises UserError for an unknown name."""
    if split_name not in SPLIT_NAMES:
        raise UserError(f"split {split_name!r}: expected one of {SPLIT_NAMES}{nearest(split_name, SPLIT_NAMES)}")
    return SPLIT_NAMES.index(split_name)


def split_range(split: str, split_name: str, sequences: int) -> range:
    """Sequence ids of a split; empty when its weight is 0. Rounds half to even, as Megatron.

    >>> split_range("98,1,1", "valid", 200)
    range(196, 198)
    """
    position = split_position(split_name)
    weights = split_weights(split)
    if weights[position] == 0:
        return range(0)
    bounds = [0.0, *accumulate(weights)]
    begin, end = (round(bounds[position + side] * sequences) for side in (0, 1))
    return range(begin, end)


def build_sample_index(
    lengths: np.ndarray,
    first_sequence: int,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    add_extra_token: bool = True,
    drop_last_partial: bool = True,
) -> SampleIndex:
    """The index of the sequences from `first_sequence` on, whose token counts are `lengths` [sequences].

    Args:
        num_samples: how many samples are needed. Documents repeat for as many epochs as necessary. None: one epoch.
        seq_length: number of tokens that a sample predicts.
        add_extra_token: a sample reads one more token, the label of its last position.
        drop_last_partial: leave out the shorter sample at the end of the stream.
    """
    extra = int(add_extra_token)
    tokens_per_epoch = int(lengths.sum(dtype=np.int64))
    needed_tokens = 1 if num_samples is None else num_samples * seq_length + extra
    epochs = max(1, -(-needed_tokens // tokens_per_epoch)) if tokens_per_epoch else 1
    available = epochs * tokens_per_epoch - extra  # tokens that can be predicted
    samples = max(0, available // seq_length if drop_last_partial else -(-available // seq_length))
    whole_epoch_samples = ((epochs - 1) * tokens_per_epoch - extra) // seq_length
    separate = epochs > 1 and _final_epoch_is_separate(
        num_samples or 0, whole_epoch_samples, (tokens_per_epoch - extra) // seq_length
    )

    random = np.random.RandomState(seed)
    ids = np.arange(first_sequence, first_sequence + len(lengths), dtype=np.int32)
    document_index = _shuffled_documents(ids, epochs, separate, random)
    sample_index = _sample_starts(lengths[document_index - first_sequence], samples, seq_length, extra)
    shuffle_index = _shuffled_samples(samples, whole_epoch_samples if separate else samples, random)
    return SampleIndex(document_index, sample_index, shuffle_index, epochs)


def _final_epoch_is_separate(num_samples: int, whole_epoch_samples: int, samples_per_epoch: int) -> bool:
    return num_samples - whole_epoch_samples < int(_FINAL_EPOCH_THRESHOLD * samples_per_epoch)


def _shuffled_documents(ids: np.ndarray, epochs: int, separate: bool, random: np.random.RandomState) -> np.ndarray:
    parts = [epochs - 1, 1] if separate else [epochs]
    shuffled = []
    for repeats in parts:
        part = np.tile(ids, repeats)
        random.shuffle(part)
        shuffled.append(part)
    return np.concatenate(shuffled)


def _sample_starts(stream_lengths: np.ndarray, samples: int, seq_length: int, extra: int) -> np.ndarray:
    """`SampleIndex.sample_index`, int32 [samples + 1, 2].

    A boundary belongs to the last token before it. So a boundary at the end of a document names that document, not the
    next one.
    """
    if not samples:
        return np.zeros((1, 2), np.int32)
    ends = np.cumsum(stream_lengths, dtype=np.int64)
    reached = np.arange(samples + 1, dtype=np.int64) * seq_length + extra  # tokens read up to each boundary
    reached[-1] = min(reached[-1], ends[-1])
    documents = np.searchsorted(ends, reached - 1, side="right")
    offsets = reached - extra - (ends - stream_lengths)[documents]
    documents[0] = offsets[0] = 0
    dtype = np.int64 if len(stream_lengths) > np.iinfo(np.int32).max else np.int32
    return np.stack([documents, offsets], axis=1).astype(dtype)


def _shuffled_samples(samples: int, first_part: int, random: np.random.RandomState) -> np.ndarray:
    dtype = np.int64 if samples >= np.iinfo(np.uint32).max - 1 else np.uint32
    order = np.arange(samples, dtype=dtype)
    random.shuffle(order[:first_part])
    if first_part < samples:
        random.shuffle(order[first_part:])
    return order
