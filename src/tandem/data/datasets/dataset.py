"""What all datasets offer: samples in training order."""

from __future__ import annotations

from typing import Protocol

from tandem.data.batch import Sample


class Dataset(Protocol):
    """Samples in training order: sample `i` is the `i`-th that the run consumes, so that any position is at hand."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def describe(self) -> dict[str, int]:
        """Counts for a start banner."""
        ...

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files, in words."""
        ...

    def sources(self) -> list[str]:
        """Of each dataset that this one mixes, how much it takes of it, in words; empty where it mixes none."""
        return []
