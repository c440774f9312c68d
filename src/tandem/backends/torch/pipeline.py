"""Activations and their gradients between pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tandem.backends.pipeline import Stage
from tandem.backends.torch.communication import Group
from tandem.parallel.pipeline import Link, pairs


@dataclass
class Pipeline(Stage):
    """Messages between one stage and its neighbours. Neither sending nor expecting one waits.

    Args:
        groups: `Groups.pipelines`.
    """

    groups: dict[tuple[bool, bool], Group]
    _sent: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)

    def open(self, device: torch.device, *, ends: bool) -> None:
        """Send a number over every link, in one order on all stages, which all call this.

        NCCL opens a connection when two ranks first talk in a group. Both then wait for each other, also in `irecv`.
        A stage that expects a gradient before it has sent the activation would wait forever.

        Args:
            ends: as in `pairs`.
        """
        for (forward, around), group in self.groups.items():
            for sender, receiver in pairs(self.grid.pipeline_size, forward=forward, around=around, ends=ends):
                number = torch.zeros(1, device=device)
                if self.place.pipeline == sender:
                    dist.send(number, self.rank_at(receiver), group=group)
                elif self.place.pipeline == receiver:
                    dist.recv(number, self.rank_at(sender), group=group)

    def expect(self, link: Link, forward: bool, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to fill x with what the chunk at `link` sends: activations when `forward`, their gradient otherwise.

        The function that is returned waits for that, and returns x. Messages arrive in the order in which they are
        expected.
        """
        around = (link.stage > self.place.pipeline) == forward
        work = dist.irecv(x, self.rank_of(link), group=self.groups[forward, around])
        assert work is not None

        def arrived() -> torch.Tensor:
            work.wait()
            return x

        return arrived

    def send(self, link: Link, forward: bool, x: torch.Tensor) -> None:
        around = (self.place.pipeline > link.stage) == forward
        x = x.contiguous()
        work = dist.isend(x, self.rank_of(link), group=self.groups[forward, around])
        assert work is not None
        self._sent = [(sent, kept) for sent, kept in self._sent if not sent.is_completed()]
        self._sent.append((work, x))  # kept until it is sent

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def copy_from_end(self, x: torch.Tensor) -> None:
        """Fill x on every stage with the last stage's. There are several stages, and all call it."""
        dist.broadcast(x, self.rank_at(self.grid.pipeline_size - 1), group=self.groups[True, False])

    def sum_over_ends(self, x: torch.Tensor) -> None:
        """Sum a tensor over the model's first and last stage, in place. Only these two, different, stages call it."""
        first = self.grid.is_first_stage(self.place)
        peer = self.rank_at(self.grid.pipeline_size - 1 if first else 0)
        received = torch.empty_like(x)
        work = dist.isend(x.contiguous(), peer, group=self.groups[first, False])
        dist.recv(received, peer, group=self.groups[not first, False])
        assert work is not None
        work.wait()
        x.add_(received)
