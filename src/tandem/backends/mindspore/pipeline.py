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
    """Messages between one stage and its neighbours. Sending does not wait; receiving does.

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
        """The passes of this stage over `micro_batches` micro-batches, in order."""
        return one_forward_one_backward(self.place.pipeline, self.grid.pipeline_size, 1, micro_batches)

    def receive(self, forward: bool, x: Tensor) -> Tensor:
        """Fill x: when `forward`, with activations of the stage before, otherwise with their gradient from the next."""
        neighbour = self._rank(-1 if forward else 1)
        return receive(x, neighbour, self.channels[neighbour, self.grid.rank(self.place)])

    def send(self, forward: bool, x: Tensor) -> None:
        """Send x: when `forward`, activations to the next stage, otherwise their gradient to the stage before."""
        neighbour = self._rank(1 if forward else -1)
        self._sent.append((send(x, neighbour, self.channels[self.grid.rank(self.place), neighbour]), x))

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()

    def copied_from_end(self, x: Tensor) -> Tensor:
        """The last stage's x, on every stage. All stages call it. Each passes it on to the one before."""
        if not self.is_last:
            x = self.receive(False, x)
        if not self.is_first:
            self.send(False, x)
        self.finish()
        return x

    def _rank(self, step: int) -> int:
        return self.grid.rank(Place(self.place.tensor, self.place.data, self.place.pipeline + step))
