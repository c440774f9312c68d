"""What all datasets offer: samples in training order."""

from __future__ import annotations

from typing import Protocol

from tandem.data.batch import Sample


class Dataset(Protocol):
    """Samples in training order: sample `i` is the `i`-th that the run consumes, so that any position is at hand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def describe(self) -> dict[str, int]: ...

    def origin(self, index: int) -> str:
        """Where a sample is in the files, in words."""
        ...
