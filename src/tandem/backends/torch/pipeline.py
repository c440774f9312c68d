"""Activations and their gradients between pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tandem.backends.torch.communication import Group
from tandem.parallel.grid import Grid, Place
from tandem.parallel.pipeline import Action, Link, after, before, one_forward_one_backward


@dataclass
class Pipeline:
    """One stage's view of its neighbours. Sending does not wait; receiving does.

    Args:
        channels: as in `Groups`.
    """

    grid: Grid
    place: Place
    chunks: int
    channels: dict[tuple[int, int, bool], Group]
    _sent: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)

    def source(self, chunk: int) -> Link | None:
        """Where a chunk's input comes from; None for the model's first."""
        return before(self.place.pipeline, chunk, self.grid.pipeline_size)

    def target(self, chunk: int) -> Link | None:
        """Where a chunk's output goes; None for the model's last."""
        return after(self.place.pipeline, chunk, self.grid.pipeline_size, self.chunks)

    def schedule(self, micro_batches: int) -> list[Action]:
        """What this stage does with so many micro-batches."""
        return one_forward_one_backward(self.place.pipeline, self.grid.pipeline_size, self.chunks, micro_batches)

    def receive(self, link: Link, forward: bool, x: torch.Tensor) -> torch.Tensor:
        """Fill x with what the chunk at `link` sends: activations when `forward`, their gradient otherwise."""
        other, own = self._rank(link), self.grid.rank(self.place)
        dist.recv(x, other, group=self.channels[other, own, forward])
        return x

    def send(self, link: Link, forward: bool, x: torch.Tensor) -> None:
        other, own = self._rank(link), self.grid.rank(self.place)
        x = x.contiguous()
        work = dist.isend(x, other, group=self.channels[own, other, forward])
        assert work is not None
        self._sent = [(sent, kept) for sent, kept in self._sent if not sent.is_completed()]
        self._sent.append((work, x))  # alive until it has left

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _rank(self, link: Link) -> int:
        return self.grid.rank(Place(self.place.tensor, self.place.data, link.stage))
