"""Activations and their gradients between pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mindspore import Tensor

from tandem.backends.mindspore.communication import receive, send
from tandem.parallel.grid import Grid, Place
from tandem.parallel.pipeline import Action, one_forward_one_backward


@dataclass
class Pipeline:
    """One stage's view of its neighbours. Sending does not wait; receiving does.

    Args:
        channels: as in `Groups`.
    """

    grid: Grid
    place: Place
    channels: dict[tuple[int, int], str]
    _sent: list[tuple[Any, Tensor]] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        return self.grid.is_first_stage(self.place)

    @property
    def is_last(self) -> bool:
        return self.grid.is_last_stage(self.place)

    def schedule(self, micro_batches: int) -> list[Action]:
        """What this stage does with so many micro-batches."""
        return one_forward_one_backward(self.place.pipeline, self.grid.pipeline_size, 1, micro_batches)

    def receive(self, forward: bool, x: Tensor) -> Tensor:
        """Fill x: with the activations of the stage before when `forward`, else with their gradient from the next."""
        other = self._rank(-1 if forward else 1)
        return receive(x, other, self.channels[other, self.grid.rank(self.place)])

    def send(self, forward: bool, x: Tensor) -> None:
        """Activations to the next stage when `forward`, else their gradient to the one before."""
        other = self._rank(1 if forward else -1)
        self._sent.append((send(x, other, self.channels[self.grid.rank(self.place), other]), x))

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()

    def _rank(self, step: int) -> int:
        return self.grid.rank(Place(self.place.tensor, self.place.data, self.place.pipeline + step))
