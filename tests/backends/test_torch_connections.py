"""NCCL opens a connection when two ranks first talk, and both wait: no stage may wait for one that waits for it."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from thread_ranks import rank, run_ranks

from tandem.backends.torch import pipeline as pipeline_module
from tandem.backends.torch.ahead import Ahead
from tandem.backends.torch.pipeline import Pipeline
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout
from tandem.parallel.pipeline import Action

KINDS = [(forward, around) for forward in (True, False) for around in (False, True)]


class LikeNccl:
    """Messages between ranks that are threads. `seconds`: how long a rank waits for another."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._doors: dict[Any, threading.Barrier] = defaultdict(lambda: threading.Barrier(2))
        self._open: set[Any] = set()
        self._messages: dict[Any, queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def _meet(self, peer: int, group: object) -> None:
        pair = group, frozenset((rank(), peer))
        with self._lock:
            if (pair, rank()) in self._open:
                return
            self._open.add((pair, rank()))
            door = self._doors[pair]
        door.wait(self._seconds)

    def _channel(self, sender: int, receiver: int, group: object) -> queue.Queue[torch.Tensor]:
        with self._lock:
            return self._messages[group, sender, receiver]

    def isend(self, x: torch.Tensor, peer: int, group: object) -> SimpleNamespace:
        self._meet(peer, group)
        self._channel(rank(), peer, group).put(x.clone())
        return SimpleNamespace(wait=lambda: None, is_completed=lambda: True)

    def irecv(self, x: torch.Tensor, peer: int, group: object) -> SimpleNamespace:
        self._meet(peer, group)
        channel = self._channel(peer, rank(), group)
        return SimpleNamespace(wait=lambda: x.copy_(channel.get(timeout=self._seconds)))

    def send(self, x: torch.Tensor, peer: int, group: object) -> None:
        self.isend(x, peer, group)

    def recv(self, x: torch.Tensor, peer: int, group: object) -> None:
        self.irecv(x, peer, group).wait()


class Asking(Ahead):
    """Only the order of what is asked for."""

    def __init__(self, ask: Callable[[Action], None]) -> None:
        self._ask = ask  # type: ignore[method-assign]


def step(stages: int, chunks: int, micro_batches: int, open_first: bool) -> Callable[[int], float]:
    """A training step of one rank, in which each pass adds 1 to what it gets; and the sum over the ends."""
    grid = Grid(Layout(pipeline_model_parallel_size=stages), stages)
    groups: Any = {kind: kind for kind in (KINDS if chunks > 1 else KINDS[::2])}

    def of_rank(number: int) -> float:
        pipeline = Pipeline(grid, grid.place(number), chunks, groups)
        if open_first:
            pipeline.open(torch.device("cpu"), ends=True)
        arrivals: dict[Action, Callable[[], torch.Tensor]] = {}

        def links(action: Action) -> list[Any]:
            found = [pipeline.source(action.chunk), pipeline.target(action.chunk)]
            return found if action.forward else found[::-1]

        def ask(action: Action) -> None:
            if (source := links(action)[0]) is not None:
                arrivals[action] = pipeline.expect(source, action.forward, torch.empty(1))

        total = torch.zeros(1)
        for action in Asking(ask).of(pipeline.schedule(micro_batches)):
            x = (arrivals.pop(action)() if action in arrivals else torch.zeros(1)) + 1
            target = links(action)[1]
            if target is None:
                total += x
            else:
                pipeline.send(target, action.forward, x)
        pipeline.finish()
        if number in (0, stages - 1):
            pipeline.sum_over_ends(total)
        return total.item()

    return of_rank


CASES = [(2, 1, 1), (3, 1, 1), (3, 1, 4), (4, 1, 2), (2, 2, 2), (3, 2, 3), (4, 2, 8)]


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), CASES)
def test_connections_are_opened_before_a_stage_could_wait(
    stages: int, chunks: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "dist", LikeNccl(60))
    totals = run_ranks(stages, step(stages, chunks, micro_batches, open_first=True))
    passes = 2 * micro_batches * stages * chunks  # forward and backward: each ends with the length of its way
    assert totals[0] == totals[-1] == passes


def test_the_stand_in_waits_as_nccl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage would expect a gradient before the second has the activation."""
    monkeypatch.setattr(pipeline_module, "dist", LikeNccl(0.5))
    with pytest.raises(threading.BrokenBarrierError):
        run_ranks(2, step(2, 1, 1, open_first=False))
