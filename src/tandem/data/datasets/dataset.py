"""The protocol of a dataset: samples in training order."""

from __future__ import annotations

from typing import Protocol

from tandem.data.batch import Sample


class Dataset(Protocol):
    """Samples in training order: sample `i` is the `i`-th of the run. Any sample can be read at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def describe(self) -> dict[str, int]:
        """Counts that a run shows at its start."""
        ...

    def origin(self, i: int) -> str:
        """Where sample `i` is in the files, for messages."""
        ...

    def place(self, i: int) -> tuple[Dataset, int]:
        """The dataset of one prefix with sample `i`, and the number of the sample in it."""
        return self, i

    def sources(self) -> list[str]:
        """For each dataset of a blend, how much is used of it, as a run shows it at its start. Else empty."""
        return []
