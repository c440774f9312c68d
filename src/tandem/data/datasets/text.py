"""Pretraining samples: windows of equal length over a stream of shuffled documents, as Megatron's `GPTDataset`."""

from __future__ import annotations

import os

import numpy as np

from tandem.data.batch import IGNORE, Sample
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.sample_index import (
    EmptySplitError,
    advice_for_empty_split,
    build_sample_index,
    share_name,
    split_range,
)
from tandem.data.datasets.segments import lengths_from_ends, restarting_positions
from tandem.data.indexed import IndexedDataset
from tandem.errors import UserError


class GPTDataset(Dataset):
    """Pretraining samples of `{prefix}.bin/.idx`.

    Args:
        split_name, split: which share of the sequences: `"train"` of `"98,1,1"`.
        num_samples: how many samples the run needs. Documents repeat for as many epochs as necessary, and the dataset
            is usually a little longer. None: one epoch.
        seq_length: number of positions of a sample.
        eod_token: id that ends a document; needed by the three flags below.
        reset_position_ids: positions restart after each `eod_token`.
        reset_attention_mask: a token attends only within its document.
        eod_mask_loss: the token after an `eod_token` is not trained.
        add_extra_token_to_sequence: read one more token as the label of the last position, which else has none.
        drop_last_partial_sequence: leave out the shorter sample at the end of the stream.

    Raises:
        UserError: the split is empty or too small for one sample, or a flag needs an `eod_token`.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        split_name: str,
        split: str,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        eod_token: int | None = None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
        add_extra_token_to_sequence: bool = True,
        drop_last_partial_sequence: bool = True,
    ) -> None:
        if eod_token is None and (reset_position_ids or reset_attention_mask or eod_mask_loss):
            raise UserError(
                "--reset-position-ids, --reset-attention-mask, --eod-mask-loss need the token that ends a document: "
                "give --tokenizer-name-or-path, the folder of a tokenizer that names its eos_token"
            )
        self.indexed = IndexedDataset(prefix)
        self.seq_length = seq_length
        self._name = f"{os.fspath(prefix)} ({share_name(split_name, split)})"
        self._eod_token = eod_token
        self._reset_position_ids = reset_position_ids
        self._reset_attention_mask = reset_attention_mask
        self._eod_mask_loss = eod_mask_loss
        self._extra = int(add_extra_token_to_sequence)

        sequences = split_range(split, split_name, len(self.indexed))
        lengths = self.indexed.lengths[sequences.start : sequences.stop]
        self._sequences, self._tokens = len(sequences), int(lengths.sum(dtype=np.int64))
        self.index = build_sample_index(
            lengths,
            sequences.start,
            num_samples,
            seq_length,
            seed,
            add_extra_token_to_sequence,
            drop_last_partial_sequence,
        )
        if len(self) == 0:
            raise EmptySplitError(
                f"{self._name}: {self._sequences} sequences with {self._tokens} tokens give no sample of "
                f"{seq_length} + {self._extra} tokens; {advice_for_empty_split(split_name, split)}, or lower "
                "--seq-length"
            )

    def __len__(self) -> int:
        return len(self.index.shuffle_index)

    def __getitem__(self, i: int) -> Sample:
        """Sample `i`, with t = seq_length positions; only a last partial sample has fewer."""
        tokens = self._read(int(self.index.shuffle_index[i]))
        if self._extra:
            tokens, labels = tokens[:-1], tokens[1:].copy()
        else:
            labels = np.append(tokens[1:], np.int32(IGNORE))
        is_eod = tokens == self._eod_token if self._eod_token is not None else np.zeros(len(tokens), bool)
        if self._eod_mask_loss:
            labels[is_eod] = IGNORE
        lengths = lengths_from_ends(is_eod)
        return Sample(
            tokens=tokens,
            labels=labels,
            position_ids=restarting_positions(lengths)
            if self._reset_position_ids
            else np.arange(len(tokens), dtype=np.int32),
            lengths=lengths if self._reset_attention_mask else (len(tokens),),
        )

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files."""
        sample = int(self.index.shuffle_index[i])
        (first, begin), (last, _) = self.index.sample_index[sample : sample + 2].tolist()
        sequences = self.index.document_index[first : last + 1].tolist()
        return f"{self.indexed.prefix}: sequences {' '.join(map(str, sequences))}, from token {begin} of the first"

    def describe(self) -> dict[str, int]:
        """Counts that a run shows at its start; sequences, tokens and samples_per_epoch are those of one epoch."""
        return {
            "sequences": self._sequences,
            "tokens": self._tokens,
            "samples_per_epoch": max(0, self._tokens - self._extra) // self.seq_length,
            "samples": len(self),
            "epochs": self.index.epochs,
        }

    def _read(self, sample: int) -> np.ndarray:
        """The tokens of a sample with its extra token, int32."""
        (first, begin), (last, end) = self.index.sample_index[sample : sample + 2].tolist()
        end += self._extra
        pieces = []
        for position in range(first, last + 1):
            start = begin if position == first else 0
            length = end - start if position == last else None
            pieces.append(self.indexed.get(int(self.index.document_index[position]), start, length))
        return np.concatenate(pieces).astype(np.int32, copy=False)
