"""What the pipelines of both frameworks share: where messages go, and in which order a stage computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tandem.parallel.grid import Grid, Place
from tandem.parallel.pipeline import Action, Link, after, before, one_forward_one_backward


@dataclass
class Stage:
    """One rank's stage of the model, in `chunks` chunks of layers. More than one chunk is interleaved."""

    grid: Grid
    place: Place
    chunks: int

    def source(self, chunk: int) -> Link | None:
        """Where a chunk's input comes from; None for the model's first."""
        return before(self.place.pipeline, chunk, self.grid.pipeline_size)

    def target(self, chunk: int) -> Link | None:
        """Where a chunk's output goes; None for the model's last."""
        return after(self.place.pipeline, chunk, self.grid.pipeline_size, self.chunks)

    def schedule(self, micro_batches: int) -> list[Action]:
        """The passes of this stage over `micro_batches` micro-batches, in order."""
        return one_forward_one_backward(self.place.pipeline, self.grid.pipeline_size, self.chunks, micro_batches)

    def rank_of(self, link: Link) -> int:
        """The rank that has another chunk, for the same tokens and the same slices."""
        return self.rank_at(link.stage)

    def rank_at(self, stage: int) -> int:
        """The rank at another stage, for the same tokens and the same slices."""
        return self.grid.rank(replace(self.place, pipeline=stage))


def recompute_counts(chunks: Sequence[Sequence[object]], layers: int) -> list[int]:
    """How many layers of each chunk belong to the first `layers` of this rank.

    >>> recompute_counts([["a", "b"], ["c", "d"]], 3)
    [2, 1]
    """
    starts = accumulate((len(chunk) for chunk in chunks), initial=0)
    return [min(max(layers - start, 0), len(chunk)) for start, chunk in zip(starts, chunks)]
