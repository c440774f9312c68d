"""Activations and their gradients between pipeline stages."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mindspore import Tensor

from tandem.backends.mindspore.communication import receive, send
from tandem.backends.pipeline import Stage
from tandem.parallel.pipeline import Link, most_on_the_way


@dataclass
class Pipeline(Stage):
    """Messages between one stage and its neighbours. Sending does not wait; receiving does.

    Args:
        channels: as in `Groups`.
    """

    channels: dict[tuple[int, int, bool], str]
    _sent: dict[bool, deque[tuple[Any, Tensor]]] = field(default_factory=lambda: {True: deque(), False: deque()})

    def receive(self, link: Link, forward: bool, x: Tensor) -> Tensor:
        """Fill x with what the chunk at `link` sends: activations when `forward`, their gradient otherwise."""
        neighbour = self.rank_of(link)
        return receive(x, neighbour, self.channels[neighbour, self._own_rank, forward])

    def send(self, link: Link, forward: bool, x: Tensor) -> None:
        neighbour = self.rank_of(link)
        sent = self._sent[forward]
        sent.append((send(x, neighbour, self.channels[self._own_rank, neighbour, forward]), x))
        self._release(sent, most_on_the_way(self.grid.pipeline_size))  # older ones have arrived

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for sent in self._sent.values():
            self._release(sent, 0)

    def copied_from_end(self, x: Tensor) -> Tensor:
        """The last stage's x, on every stage. All stages call it. Each passes it on to the one before."""
        stage = self.place.pipeline
        if not self.grid.is_last_stage(self.place):
            x = self.receive(Link(stage + 1, 0), False, x)
        if not self.grid.is_first_stage(self.place):
            self.send(Link(stage - 1, 0), False, x)
        self.finish()
        return x

    @staticmethod
    def _release(sent: deque[tuple[Any, Tensor]], kept: int) -> None:
        """Free the memory of all but the last `kept` messages."""
        while len(sent) > kept:
            handle, _ = sent.popleft()
            handle.wait()

    @property
    def _own_rank(self) -> int:
        return self.grid.rank(self.place)
