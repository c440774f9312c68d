"""Megatron's weighted blend of datasets: deterministic, and as even as possible at every point of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.data.batch import Sample
from tandem.data.datasets.dataset import Dataset
from tandem.errors import UserError
from tandem.files.places import resolved

_MARGIN = 1.005  # as in Megatron, each dataset is built half a percent larger than its share


def parse_blend(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a `--data-path`: prefixes alone, or weight, prefix, weight, prefix, ...

    Without weights they are None; the datasets then count by their size.

    >>> parse_blend(["0.7", "web", "0.3", "books"])
    (['web', 'books'], [0.7, 0.3])
    >>> parse_blend(["web", "books"])
    (['web', 'books'], None)

    Raises:
        UserError: nothing is given, a weight is not in its place, or a prefix is named twice.
    """
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
                f"--data-path {' '.join(data_path)}: expected a prefix, found {prefix}; give prefixes alone, or a "
                f"weight before each"
            )
    if len(set(map(resolved, prefixes))) < len(prefixes):
        raise UserError(f"--data-path: a prefix is named twice: {' '.join(prefixes)}; give it one weight")
    return prefixes, weights


def plain_paths(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a `--data-path`, with each path in its shortest form: `./x` becomes `x`."""
    return tuple(map(os.path.normpath, words))


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum."""
    if not weights or min(weights) <= 0 or not math.isfinite(sum(weights)):
        raise UserError(f"--data-path: blend weights {list(weights)}: expected a positive number for each dataset")
    return [weight / sum(weights) for weight in weights]


def blend_sizes(weights: Sequence[float], num_samples: int) -> tuple[list[int], int]:
    """The number of samples to build each dataset for, and the length of the blend.

    That length may be a little over `num_samples`, since each share is rounded up.
    """
    shares = [math.ceil(num_samples * weight) for weight in normalized(weights)]
    return [math.ceil(share * _MARGIN) for share in shares], sum(shares)


def blend_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The dataset of each position, int16 [size], and the number of the sample in it, int64 [size].

    Each position takes the dataset that is furthest behind its weight; of equals, the first.

    >>> blend_indices([2, 1], size=6)[0].tolist()
    [0, 1, 0, 0, 1, 0]

    Source: `build_blending_indices` of Megatron-core.
    """
    shares = np.array(normalized(weights))
    dataset_index = _furthest_behind(shares, size)
    dataset_sample_index = np.empty(size, np.int64)
    for dataset in range(len(shares)):
        positions = np.flatnonzero(dataset_index == dataset)
        dataset_sample_index[positions] = np.arange(len(positions))
    return dataset_index, dataset_sample_index


def _furthest_behind(shares: np.ndarray, size: int) -> np.ndarray:
    """The dataset of each position, int16 [size].

    Each step depends on the counts of all steps before it. To be fast, the range is cut into parts, which are computed
    at the same time from guessed counts. A part is computed again if its guess differs from how the part before it
    ends. The guess matters only for a few steps, so nearly always the second round is the last. The result is exact.
    """
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
    """`totals * shares`, rounded so that each row sums to its total: int64 [totals, shares]."""
    exact = totals[:, None] * shares
    whole = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(whole - exact, axis=1), axis=1)
    return whole + (rank < (totals - whole.sum(axis=1))[:, None])


@dataclass(frozen=True)
class Segment:
    """A part of a run with constant weights.

    Attributes:
        begin: number of its first sample.
        weights: one per dataset; 0 for a dataset that is not used.
    """

    begin: int
    weights: tuple[float, ...]


def segment_indices(segments: Sequence[Segment], size: int) -> tuple[np.ndarray, np.ndarray]:
    """As `blend_indices`, over several segments. In each dataset, a segment continues where the one before stopped."""
    dataset_index, dataset_sample_index = np.empty(size, np.int16), np.empty(size, np.int64)
    cursors = np.zeros(len(segments[0].weights), np.int64)
    ends = [*(segment.begin for segment in segments[1:]), size]
    for segment, end in zip(segments, ends):
        part = slice(segment.begin, end)
        used = np.flatnonzero(segment.weights)
        choices, samples = blend_indices([segment.weights[i] for i in used], end - segment.begin)
        dataset_index[part] = used[choices]
        dataset_sample_index[part] = samples + cursors[used[choices]]
        cursors += np.bincount(dataset_index[part], minlength=len(cursors))
    return dataset_index, dataset_sample_index


class BlendedDataset(Dataset):
    """A blend of datasets with `size` samples.

    Args:
        datasets: each at least as long as its part of the blend; None for a dataset that the last segment does not use.

    Raises:
        UserError: a dataset is shorter than its part.
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

    def place(self, i: int) -> tuple[Dataset, int]:
        """The dataset of one prefix with sample `i`, and the number of the sample in it."""
        dataset = self.datasets[int(self.dataset_index[i])]
        assert dataset is not None
        return dataset.place(int(self.dataset_sample_index[i]))

    def counts(self) -> list[int]:
        """Number of samples from each dataset."""
        return list(np.bincount(self.dataset_index, minlength=len(self.datasets)).tolist())

    def describe(self) -> dict[str, int]:
        """Counts that a run shows at its start: sums over the datasets."""
        parts = [dataset.describe() for dataset in self.datasets if dataset is not None]
        counts = {name: sum(part[name] for part in parts) for name in ("sequences", "tokens", "samples_per_epoch")}
        return {**counts, "samples": len(self)}

    def sources(self) -> list[str]:
        """For each dataset its weight, its size, and how many samples and epochs of it are used."""
        lines = []
        for dataset, weight, used in zip(self.datasets, self.weights, self.counts()):
            if dataset is None:
                lines.append(f"no longer used, {used:,} were used")
                continue
            counts = dataset.describe()
            lines.append(
                f"weight {weight:.4g}, {counts['tokens']:,} tokens, {counts['samples_per_epoch']:,} samples per epoch, "
                f"{used:,} used ({used / max(1, counts['samples_per_epoch']):.2f} epochs)"
            )
        return lines


class ChainedDataset(Dataset):
    """Datasets one after the other.

    They are whole sets. Or they are of the same files: a run that goes on longer than planned continues with a second
    dataset. Then the counts are those of the first.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Sample:
        part, number = self._place(i)
        return part[number]

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files."""
        part, number = self._place(i)
        return part.origin(number)

    def place(self, i: int) -> tuple[Dataset, int]:
        """The dataset of one prefix with sample `i`, and the number of the sample in it."""
        part, number = self._place(i)
        return part.place(number)

    def describe(self) -> dict[str, int]:
        """Counts that a run shows at its start."""
        counts = {**self.parts[0].describe(), "samples": len(self)}
        if "epochs" in counts:
            counts["epochs"] = -(-len(self) // max(1, counts["samples_per_epoch"]))
        return counts

    def _place(self, i: int) -> tuple[Dataset, int]:
        """The part with sample `i`, and the number of the sample in it."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        part = self.parts[number]
        return part, i - int(self._ends[number]) + len(part)
