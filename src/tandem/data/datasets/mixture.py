"""The mixture of a run's training data over its whole life, in which weights may change when it is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.data.datasets.blend import (
    BlendedDataset,
    ChainedDataset,
    Segment,
    blend_sizes,
    normalized,
    plain_paths,
    segment_indices,
)
from tandem.data.datasets.dataset import Dataset

# prefix, samples, and which of several datasets of the same prefix it is -> the dataset
Build = Callable[[str, int, int], Dataset]


@dataclass(frozen=True)
class Mixture:
    """Which source each sample of a run comes from.

    Attributes:
        prefixes: of all sources, those among them that are no longer taken from.
        segments: the weights from the beginning on, one segment for each time they changed.
        sizes: by prefix, what its datasets were built for, one after the other. A pretraining set's order depends on
            its size, so what was begun is finished as it was, and another dataset follows.
        size: samples of the whole run.
    """

    prefixes: tuple[str, ...]
    segments: tuple[Segment, ...]
    sizes: dict[str, list[int]]
    size: int

    @classmethod
    def of(
        cls, prefixes: Sequence[str], weights: Sequence[float], samples: int, earlier: Mixture | None, consumed: int
    ) -> Mixture:
        """The mixture of a run of `samples` samples, which may go on from an `earlier` one after `consumed` samples."""
        now = dict(zip(prefixes, normalized(weights)))
        if earlier is None or not consumed:
            if len(prefixes) == 1:
                return cls(tuple(prefixes), (Segment(0, (1.0,)),), {prefixes[0]: [samples]}, samples)
            sizes, length = blend_sizes(weights, samples)
            built = {prefix: [size] for prefix, size in zip(prefixes, sizes)}
            return cls(tuple(prefixes), (Segment(0, tuple(now.values())),), built, length)
        named = tuple(dict.fromkeys([*earlier.prefixes, *prefixes]))
        before = [segment for segment in earlier.segments if segment.begin < consumed]
        last = dict(zip(earlier.prefixes, before[-1].weights))
        if {prefix: weight for prefix, weight in last.items() if weight} != now:
            before.append(Segment(consumed, tuple(now.get(prefix, 0.0) for prefix in named)))
        segments = tuple(Segment(s.begin, (*s.weights, *[0.0] * (len(named) - len(s.weights)))) for s in before)
        sizes_before = {prefix: list(earlier.sizes.get(prefix, [])) for prefix in named}
        return cls(named, segments, sizes_before, max(samples, consumed))  # a run may be over already

    def open(self, build: Build, grows: bool) -> tuple[Dataset, Mixture]:
        """The samples, and the mixture with the sizes that were built for it.

        Args:
            grows: a dataset's order does not depend on its size, so that one dataset serves for all.
        """
        which, _ = segment_indices(self.segments, self.size)
        needed = np.bincount(which, minlength=len(self.prefixes)).tolist()
        datasets: list[Dataset | None] = []
        built = {}
        for prefix, weight, count in zip(self.prefixes, self.segments[-1].weights, needed):
            sizes = [max(count, *self.sizes[prefix])] if grows and self.sizes[prefix] else self.sizes[prefix] or [count]
            dataset = None
            if weight:
                dataset, sizes = _chain(prefix, sizes, count, build)
            datasets.append(dataset)
            built[prefix] = sizes
        mixture = Mixture(self.prefixes, self.segments, built, self.size)
        if len(datasets) == 1:
            assert datasets[0] is not None
            return datasets[0], mixture
        return BlendedDataset(datasets, self.segments, self.size), mixture

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        segments = [{"begin": segment.begin, "weights": list(segment.weights)} for segment in self.segments]
        return {"prefixes": list(self.prefixes), "segments": segments, "sizes": self.sizes, "size": self.size}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any] | None) -> Mixture | None:
        """What `to_dict` gave; None without any."""
        if value is None:
            return None
        segments = tuple(Segment(entry["begin"], tuple(entry["weights"])) for entry in value["segments"])
        prefixes = plain_paths(value["prefixes"])
        sizes = dict(zip(plain_paths(list(value["sizes"])), value["sizes"].values()))
        return cls(prefixes, segments, sizes, value["size"])


def _chain(prefix: str, sizes: list[int], needed: int, build: Build) -> tuple[Dataset, list[int]]:
    """The datasets of one prefix, and one more where they are too short."""
    parts = [build(prefix, size, number) for number, size in enumerate(sizes)]
    missing = needed - sum(map(len, parts))
    if missing > 0:
        sizes = [*sizes, missing]
        parts.append(build(prefix, missing, len(parts)))
    return (parts[0] if len(parts) == 1 else ChainedDataset(parts)), sizes
