"""Megatron's weighted blend of datasets: deterministic, as even as can be at every point of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tandem.data.batch import Sample
from tandem.errors import UserError

_MARGIN = 1.005  # Megatron builds each dataset half a percent larger than its share


class Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def describe(self) -> dict[str, int]: ...


def parse_blend(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a `--data-path`: one prefix, several (weights None: by size), or weight, prefix, ..."""
    if not data_path:
        raise UserError("--data-path is required: the prefix that `tandem preprocess` wrote")
    try:
        weights = [float(word) for word in data_path[0::2]] if len(data_path) % 2 == 0 else None
    except ValueError:
        weights = None
    prefixes = list(data_path if weights is None else data_path[1::2])
    for prefix in prefixes:
        if prefix.replace(".", "", 1).isdigit():
            raise UserError(
                f"--data-path {' '.join(data_path)}: {prefix} stands where a prefix is expected; give prefixes alone, "
                f"or a weight before each"
            )
    return prefixes, weights


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum."""
    if not weights or min(weights) <= 0 or not math.isfinite(sum(weights)):
        raise UserError(f"blend weights {list(weights)}: expected positive numbers, one per dataset")
    return [weight / sum(weights) for weight in weights]


def blend_sizes(weights: Sequence[float], num_samples: int) -> tuple[list[int], int]:
    """How many samples each dataset must be built for, and the length of the blend (a little over `num_samples`)."""
    shares = [math.ceil(num_samples * weight) for weight in normalized(weights)]
    return [math.ceil(share * _MARGIN) for share in shares], sum(shares)


def blend_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Dataset of each position, int16 [size], and the sample within it, int64 [size].

    Each step takes the dataset that lags most behind its weight, the first of equals. Source:
    `build_blending_indices` of Megatron-core.
    """
    shares = np.array(normalized(weights))
    dataset_index = _most_lagging(shares, size)
    dataset_sample_index = np.empty(size, np.int64)
    for dataset in range(len(shares)):
        mine = np.flatnonzero(dataset_index == dataset)
        dataset_sample_index[mine] = np.arange(len(mine))
    return dataset_index, dataset_sample_index


def _most_lagging(shares: np.ndarray, size: int) -> np.ndarray:
    """int16 [size]. A step needs the counts that all steps before it left, so parts of the range run side by side from
    guessed counts; a part whose guess is not what the part before it ends with runs again. The rule forgets where it
    began within a few steps, so nearly always a second round confirms all. The result is exact whatever the guesses."""
    parts = max(1, math.isqrt(size))
    steps = -(-size // parts)
    begins = np.arange(parts, dtype=np.int64) * steps
    counts = _rounded(begins, shares)
    ends = np.empty_like(counts)
    chosen = np.empty((parts, steps), np.int16)
    wrong = np.arange(parts)
    while len(wrong):
        running, rows = counts[wrong], np.arange(len(wrong))
        for step in range(steps):
            reached = np.maximum(begins[wrong] + step, 1).astype(np.float64)
            chosen[wrong, step] = most = np.argmax(reached[:, None] * shares - running, axis=1)
            running[rows, most] += 1
        ends[wrong] = running
        wrong = 1 + np.flatnonzero((counts[1:] != ends[:-1]).any(axis=1))
        counts[wrong] = ends[wrong - 1]
    return chosen.ravel()[:size]


def _rounded(totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """int64 [totals, shares]: whole numbers near `totals * shares` whose sums are `totals`."""
    exact = totals[:, None] * shares
    whole = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(whole - exact, axis=1), axis=1)
    return whole + (rank < (totals - whole.sum(axis=1))[:, None])


class BlendedDataset:
    """Datasets mixed by weight; each must be built for its part of `blend_sizes`.

    Raises:
        UserError: a dataset is shorter than its share.
    """

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[float], num_samples: int) -> None:
        if len(datasets) != len(weights):
            raise UserError(f"{len(datasets)} datasets and {len(weights)} weights; expected one weight per dataset")
        self.datasets = list(datasets)
        self.weights = normalized(weights)
        _, size = blend_sizes(weights, num_samples)
        self.dataset_index, self.dataset_sample_index = blend_indices(weights, size)
        needed = np.bincount(self.dataset_index, minlength=len(datasets)).tolist()
        for number, (dataset, count) in enumerate(zip(datasets, needed)):
            if len(dataset) < count:
                raise UserError(f"dataset {number} of the blend has {len(dataset)} samples, but its share is {count}")

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> Sample:
        return self.datasets[int(self.dataset_index[i])][int(self.dataset_sample_index[i])]

    def describe(self) -> dict[str, int]:
        """Counts for a start banner; those of an epoch are sums over the datasets."""
        parts = [dataset.describe() for dataset in self.datasets]
        counts = {name: sum(part[name] for part in parts) for name in ("sequences", "tokens", "samples_per_epoch")}
        return {**counts, "samples": len(self)}

    def sources(self) -> list[str]:
        """For each dataset its weight, its size, and how often the blend goes through it (C8)."""
        lines = []
        for number, (dataset, weight) in enumerate(zip(self.datasets, self.weights)):
            counts, used = dataset.describe(), int(np.count_nonzero(self.dataset_index == number))
            lines.append(
                f"weight {weight:.4g}, {counts['tokens']:,} tokens, {counts['samples_per_epoch']:,} samples per epoch, "
                f"{used:,} used ({used / max(1, counts['samples_per_epoch']):.2f} epochs)"
            )
        return lines
