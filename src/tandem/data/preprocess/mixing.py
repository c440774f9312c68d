"""Several datasets become one by taking their samples in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.data.indexed import IndexedDataset

_DRAWN_AT_ONCE = 1000  # of the generator; part of what makes the order the same as upstream's


def interleaved(
    lengths: Sequence[int], probabilities: Sequence[float] | None, seed: int, oversample: bool
) -> np.ndarray:
    """int64 [samples]: which sample of the datasets, laid end to end, comes next.

    Without `probabilities` the datasets take turns; with them each turn is drawn. It ends when the first dataset is
    used up, or with `oversample` when all have been, the others beginning again. Source: `interleave_datasets` of
    Hugging Face `datasets`, which upstream calls.
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
        mine = np.flatnonzero(turns == dataset)
        order[mine] = np.arange(len(mine)) % size + offset
    return order


def _drawn_turns(sizes: np.ndarray, probabilities: Sequence[float], seed: int, oversample: bool) -> np.ndarray:
    """int64 [turns]: whose turn it is, up to the one that uses up the first dataset, or the last with `oversample`."""
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
    """Sequences of a dataset in another order, some perhaps several times."""

    def __init__(self, dataset: IndexedDataset, order: np.ndarray) -> None:
        self._dataset = dataset
        self._order = order
        self.lengths = dataset.lengths[order]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._dataset[int(self._order[index])]
