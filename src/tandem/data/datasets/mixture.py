"""The mixture of a run's training data. Its weights may change each time the run is resumed."""

from __future__ import annotations

import os
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
    segment_indices,
)
from tandem.data.datasets.dataset import Dataset
from tandem.data.kinds import kind_of
from tandem.files.places import resolved, same_place

# prefix, number of samples, number of the dataset among those of this prefix -> the dataset
Build = Callable[[str, int, int], Dataset]


@dataclass(frozen=True)
class Mixture:
    """Which source each sample of a run comes from.

    Attributes:
        prefixes: prefixes of all sources, also of those that are no longer used.
        segments: the weights from the beginning of the run; a new segment begins where they change.
        sizes: by prefix, the numbers of samples that its datasets were built for. The order of pretraining data depends
            on that size. So a run that goes on longer finishes its dataset, and continues with another one.
        size: number of samples of the whole run.
    """

    prefixes: tuple[str, ...]
    segments: tuple[Segment, ...]
    sizes: dict[str, list[int]]
    size: int

    @classmethod
    def of(
        cls, prefixes: Sequence[str], weights: Sequence[float], samples: int, earlier: Mixture | None, consumed: int
    ) -> Mixture:
        """The mixture of a run of `samples` samples, which may resume an `earlier` one after `consumed` samples."""
        weight_of = dict(zip(prefixes, normalized(weights)))
        if earlier is None or not consumed:
            if len(prefixes) == 1:
                return cls(tuple(prefixes), (Segment(0, (1.0,)),), {prefixes[0]: [samples]}, samples)
            sizes, length = blend_sizes(weights, samples)
            sizes_of = {prefix: [size] for prefix, size in zip(prefixes, sizes)}
            return cls(tuple(prefixes), (Segment(0, tuple(weight_of.values())),), sizes_of, length)
        all_prefixes = tuple(dict.fromkeys([*earlier.prefixes, *prefixes]))
        begun = [segment for segment in earlier.segments if segment.begin < consumed]
        last_weights = dict(zip(earlier.prefixes, begun[-1].weights))
        if {prefix: weight for prefix, weight in last_weights.items() if weight} != weight_of:
            begun.append(Segment(consumed, tuple(weight_of.get(prefix, 0.0) for prefix in all_prefixes)))
        segments = tuple(Segment(s.begin, (*s.weights, *[0.0] * (len(all_prefixes) - len(s.weights)))) for s in begun)
        earlier_sizes = {prefix: list(earlier.sizes.get(prefix, [])) for prefix in all_prefixes}
        return cls(all_prefixes, segments, earlier_sizes, max(samples, consumed))  # the run may be over already

    def open(self, build: Build, extendable: bool) -> tuple[Dataset, Mixture]:
        """The samples, and the mixture with the sizes of the datasets that were built.

        Args:
            extendable: a dataset that is built longer begins with the same samples, so one per prefix is enough.
        """
        dataset_index, _ = segment_indices(self.segments, self.size)
        needed = np.bincount(dataset_index, minlength=len(self.prefixes)).tolist()
        datasets: list[Dataset | None] = []
        built_sizes = {}
        for prefix, weight, count in zip(self.prefixes, self.segments[-1].weights, needed):
            sizes = self.sizes[prefix] or [count]
            if extendable:
                sizes = [max(count, *sizes)]
            dataset = None
            if weight:
                dataset, sizes = _chain(prefix, sizes, count, build)
            datasets.append(dataset)
            built_sizes[prefix] = sizes
        mixture = Mixture(self.prefixes, self.segments, built_sizes, self.size)
        if len(datasets) == 1:
            assert datasets[0] is not None
            return datasets[0], mixture
        return BlendedDataset(datasets, self.segments, self.size), mixture

    def to_dict(self) -> dict[str, Any]:
        """The mixture as JSON values. `places` are what the prefixes resolve to."""
        return {
            "prefixes": list(self.prefixes),
            "segments": [{"begin": segment.begin, "weights": list(segment.weights)} for segment in self.segments],
            "sizes": self.sizes,
            "size": self.size,
            "places": {prefix: resolved(prefix) for prefix in self.prefixes},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any] | None, prefixes: Sequence[str] = ()) -> Mixture | None:
        """The mixture that `to_dict` gave; None for None.

        Args:
            prefixes: how a user calls the sources now. A source keeps its samples when only its spelling changes.
        """
        if value is None:
            return None
        segments = tuple(Segment(entry["begin"], tuple(entry["weights"])) for entry in value["segments"])
        names = {old: _name_now(old, prefixes, value.get("places", {})) for old in value["prefixes"]}
        sizes = {names.get(old, old): size for old, size in value["sizes"].items()}
        return cls(tuple(names.values()), segments, sizes, value["size"])


def same_words(now: Sequence[str], before: Sequence[str], places: Mapping[str, str]) -> bool:
    """Whether the words of two `--data-path`s are the same weights and the same data.

    >>> same_words(["0.5", "./a", "0.5", "b"], ["0.5", "a", "0.5", "b/"], {})
    True

    Args:
        places: what the prefixes in `before` resolved to, as far as it was recorded.
    """
    return len(now) == len(before) and all(_same_data(new, old, places) for new, old in zip(now, before))


def _name_now(old: str, prefixes: Sequence[str], places: Mapping[str, str]) -> str:
    return next((new for new in prefixes if _same_data(new, old, places)), os.path.normpath(old))


def _same_data(now: str, before: str, places: Mapping[str, str]) -> bool:
    place = places.get(before, places.get(os.path.normpath(before)))
    return same_place(now, before, place, lambda prefix: kind_of(prefix) is not None)


def _chain(prefix: str, sizes: list[int], needed: int, build: Build) -> tuple[Dataset, list[int]]:
    """The datasets of one prefix as one, and their sizes. If they are too short, one more is built."""
    parts = [build(prefix, size, number) for number, size in enumerate(sizes)]
    missing = needed - sum(map(len, parts))
    if missing > 0:
        sizes = [*sizes, missing]
        parts.append(build(prefix, missing, len(parts)))
    return (parts[0] if len(parts) == 1 else ChainedDataset(parts)), sizes
