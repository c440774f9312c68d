"""Fine-tuning samples in training order."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from tandem.data.batch import Sample, join
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.epochs import EpochOrders
from tandem.data.datasets.sequences import SFTSequences
from tandem.data.packing import greedy_knapsack


class SFTDataset(Dataset):
    """Fine-tuning samples: one per stored sequence, or with `pack` as many sequences per sample as fit.

    Each epoch has all sequences, in a new random order. The order does not depend on how many samples are asked for.
    Packed sequences stay separate documents. An epoch always has the same number of samples, since packing depends
    only on lengths.

    Args:
        prefix, split_name, split, seq_length, flags: see `SFTSequences`.
        num_samples: how many samples the run needs, rounded up to whole epochs. None: one epoch.
        shuffle: False keeps the stored order; with `pack`, the order of packing.
        pack: fill samples up to `seq_length`.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        split_name: str,
        split: str,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        pack: bool = False,
        **flags: Any,
    ) -> None:
        self._prefix = os.fspath(prefix)
        self._sequences = SFTSequences(prefix, split_name, split, seq_length, **flags)
        self._seed, self._shuffle, self._pack = seed, shuffle, pack
        self._orders = EpochOrders(self._sequences.ids, seed, shuffle)
        self._epoch, self._rows = 0, self._epoch_rows(0)
        self._epochs = 1 if num_samples is None else max(1, -(-num_samples // len(self._rows)))

    def __len__(self) -> int:
        return self._epochs * len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        """Sample `i`, with at most `seq_length` positions."""
        return join([self._sequences.sample(sequence) for sequence in self._numbers(i)])

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files."""
        return f"{self._prefix}: sequences {' '.join(map(str, self._numbers(i)))}"

    def describe(self) -> dict[str, int]:
        """Counts that a run shows at its start.

        The tokens are those of one epoch, including padding and what is cut later.
        """
        return {
            "sequences": len(self._sequences.ids),
            "tokens": int(self._sequences.lengths.sum(dtype=np.int64)),
            "samples_per_epoch": len(self._rows),
            "samples": len(self),
            "epochs": self._epochs,
        }

    def _numbers(self, i: int) -> list[int]:
        """The sequences of sample `i`."""
        epoch, position = divmod(range(len(self))[i], len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._epoch_rows(epoch)
        numbers: list[int] = self._rows[position].tolist()
        return numbers

    def _epoch_rows(self, epoch: int) -> np.ndarray | list[np.ndarray]:
        """For each sample of an epoch, the numbers of its sequences."""
        order = self._orders.order(epoch)
        if not self._pack:
            return order[:, None]
        capacity = self._sequences.seq_length
        lengths = np.minimum(self._sequences.lengths[order - self._sequences.ids.start], capacity)
        rows = greedy_knapsack(lengths.tolist(), capacity)  # longest first
        numbers = (
            np.random.RandomState([self._seed, epoch]).permutation(len(rows)) if self._shuffle else range(len(rows))
        )
        return [order[rows[number]] for number in numbers]
