"""Mixing several datasets into one, by taking their samples in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.data.indexed import IndexedDataset

_DRAWN_AT_ONCE = 1000  # as in upstream: with another number, the order would be different


def interleaved(
    lengths: Sequence[int], probabilities: Sequence[float] | None, seed: int, oversample: bool
) -> np.ndarray:
    """The order of the mixed samples, int64 [samples], as numbers of the samples of all datasets laid end to end.

    Without `probabilities` the datasets take turns; with them each turn is drawn. The order ends when the first dataset
    is used up. With `oversample` it ends when all are used up; a dataset that is used up before begins again.

    >>> interleaved([2, 3], None, seed=0, oversample=False).tolist()
    [0, 2, 1, 3]

    Source: `interleave_datasets` of Hugging Face `datasets`, which upstream calls.
    """
    assert min(lengths) > 0
    sizes = np.array(lengths, np.int64)
    offsets = np.cumsum(sizes) - sizes
    if probabilities is None:
        rounds = np.arange(sizes.max() if oversample else sizes.min())[:, None]
        return np.asarray((rounds % sizes + offsets).ravel(), np.int64)
    turns = _drawn_turns(sizes, probabilities, seed, oversample)
    order = np.empty(len(turns), np.int64)
    for dataset, (size, offset) in enumerate(zip(sizes, offsets)):
        positions = np.flatnonzero(turns == dataset)
        order[positions] = np.arange(len(positions)) % size + offset
    return order


def _drawn_turns(sizes: np.ndarray, probabilities: Sequence[float], seed: int, oversample: bool) -> np.ndarray:
    """The dataset of each turn, int64 [turns], until one is used up, or with `oversample` until all are."""
    random = np.random.default_rng(seed)
    draws: list[np.ndarray] = []
    counts = np.zeros_like(sizes)
    enough, last = (np.all, max) if oversample else (np.any, min)
    while not enough(counts >= sizes):
        draws.append(random.choice(len(sizes), size=_DRAWN_AT_ONCE, p=probabilities))
        counts += np.bincount(draws[-1], minlength=len(sizes))
    turns = np.concatenate(draws)
    used_up = [np.flatnonzero(turns == i)[size - 1] for i, size in enumerate(sizes) if counts[i] >= size]
    return turns[: last(used_up) + 1]


class Selection:
    """Sequences of a dataset in another order. A sequence may occur several times, or not at all."""

    def __init__(self, dataset: IndexedDataset, order: np.ndarray) -> None:
        self._dataset = dataset
        self._order = order
        self.lengths = dataset.lengths[order]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._dataset[int(self._order[index])]
