"""Activations and their gradients between pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mindspore import Tensor

from tandem.backends.mindspore.communication import receive, send
from tandem.backends.pipeline import Stage
from tandem.parallel.pipeline import Link


@dataclass
class Pipeline(Stage):
    """Messages between one stage and its neighbours. Sending does not wait; receiving does.

    Args:
        channels: as in `Groups`.
    """

    channels: dict[tuple[int, int, bool], str]
    _sent: list[tuple[Any, Tensor]] = field(default_factory=list)

    def receive(self, link: Link, forward: bool, x: Tensor) -> Tensor:
        """Fill x with what the chunk at `link` sends: activations when `forward`, their gradient otherwise."""
        neighbour = self.rank_of(link)
        return receive(x, neighbour, self.channels[neighbour, self._own_rank, forward])

    def send(self, link: Link, forward: bool, x: Tensor) -> None:
        neighbour = self.rank_of(link)
        self._sent.append((send(x, neighbour, self.channels[self._own_rank, neighbour, forward]), x))

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()

    def copied_from_end(self, x: Tensor) -> Tensor:
        """The last stage's x, on every stage. All stages call it. Each passes it on to the one before."""
        stage = self.place.pipeline
        if not self.grid.is_last_stage(self.place):
            x = self.receive(Link(stage + 1, 0), False, x)
        if not self.grid.is_first_stage(self.place):
            self.send(Link(stage - 1, 0), False, x)
        self.finish()
        return x

    @property
    def _own_rank(self) -> int:
        return self.grid.rank(self.place)
