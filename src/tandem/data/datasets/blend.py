"""Megatron's weighted blend of datasets: deterministic, as even as can be at every point of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.data.batch import Sample
from tandem.data.datasets.dataset import Dataset
from tandem.errors import UserError

_MARGIN = 1.005  # Megatron builds each dataset half a percent larger than its share


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
    if len(set(prefixes)) < len(prefixes):
        raise UserError(f"--data-path: a prefix is named twice: {' '.join(prefixes)}; give it one weight")
    return prefixes, weights


def plain_paths(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a `--data-path`, each path in its shortest spelling, so that `./x` and `x` are one."""
    return tuple(map(os.path.normpath, words))


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


@dataclass(frozen=True)
class Segment:
    """A part of a run in which the weights stay as they are: from sample `begin` on, a weight per dataset, 0 for one
    that is not taken from."""

    begin: int
    weights: tuple[float, ...]


def segment_indices(segments: Sequence[Segment], size: int) -> tuple[np.ndarray, np.ndarray]:
    """As `blend_indices`, over segments of which each goes on in every dataset where those before it stopped."""
    dataset_index, dataset_sample_index = np.empty(size, np.int16), np.empty(size, np.int64)
    cursors = np.zeros(len(segments[0].weights), np.int64)
    ends = [*(segment.begin for segment in segments[1:]), size]
    for segment, end in zip(segments, ends):
        part = slice(segment.begin, end)
        taken_from = np.flatnonzero(segment.weights)
        which, within = blend_indices([segment.weights[i] for i in taken_from], end - segment.begin)
        dataset_index[part] = taken_from[which]
        dataset_sample_index[part] = within + cursors[taken_from[which]]
        cursors += np.bincount(dataset_index[part], minlength=len(cursors))
    return dataset_index, dataset_sample_index


class BlendedDataset(Dataset):
    """Datasets mixed by weight, `size` samples in all.

    Args:
        datasets: each as long as its part of the blend; None for one that the last segment does not take from.

    Raises:
        UserError: a dataset is shorter than its share.
    """

    def __init__(self, datasets: Sequence[Dataset | None], segments: Sequence[Segment], size: int) -> None:
        assert all(len(segment.weights) == len(datasets) for segment in segments)
        self.datasets = list(datasets)
        self.weights = segments[-1].weights
        self.dataset_index, self.dataset_sample_index = segment_indices(segments, size)
        for number, (dataset, count) in enumerate(zip(datasets, self.counts())):
            if dataset is not None and len(dataset) < count:
                raise UserError(f"dataset {number} of the blend has {len(dataset)} samples, but its share is {count}")

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> Sample:
        dataset = self.datasets[int(self.dataset_index[i])]
        assert dataset is not None
        return dataset[int(self.dataset_sample_index[i])]

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files."""
        dataset = self.datasets[int(self.dataset_index[i])]
        assert dataset is not None
        return dataset.origin(int(self.dataset_sample_index[i]))

    def counts(self) -> list[int]:
        """Samples taken of each dataset."""
        return list(np.bincount(self.dataset_index, minlength=len(self.datasets)).tolist())

    def describe(self) -> dict[str, int]:
        """Counts for a start banner; those of an epoch are sums over the datasets."""
        parts = [dataset.describe() for dataset in self.datasets if dataset is not None]
        counts = {name: sum(part[name] for part in parts) for name in ("sequences", "tokens", "samples_per_epoch")}
        return {**counts, "samples": len(self)}

    def sources(self) -> list[str]:
        """For each dataset its weight, its size, and how often the blend goes through it."""
        lines = []
        for dataset, weight, used in zip(self.datasets, self.weights, self.counts()):
            if dataset is None:
                lines.append(f"no longer taken from, {used:,} used")
                continue
            counts = dataset.describe()
            lines.append(
                f"weight {weight:.4g}, {counts['tokens']:,} tokens, {counts['samples_per_epoch']:,} samples per epoch, "
                f"{used:,} used ({used / max(1, counts['samples_per_epoch']):.2f} epochs)"
            )
        return lines


class ChainedDataset(Dataset):
    """Datasets one after the other: whole sets, or of the same files what a run goes on with beyond what it was first
    built for, whose counts are then those of the first."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Sample:
        part, within = self._place(i)
        return part[within]

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files."""
        part, within = self._place(i)
        return part.origin(within)

    def describe(self) -> dict[str, int]:
        """Counts for a start banner."""
        counts = {**self.parts[0].describe(), "samples": len(self)}
        if "epochs" in counts:
            counts["epochs"] = -(-len(self) // max(1, counts["samples_per_epoch"]))
        return counts

    def _place(self, i: int) -> tuple[Dataset, int]:
        """The dataset that sample `i` is in, and its number there."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        part = self.parts[number]
        return part, i - int(self._ends[number]) + len(part)
