"""MindSpore's collectives: joining the job that msrun started, and the groups of ranks in it.

On CPU a collective that has timed out leaves messages behind, and the next one silently adds them up: the first failure
therefore ends all communication of the process. Every method of `Ranks` is called by all of its ranks, in one order.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import mindspore as ms
import mindspore.mint.distributed as dist
from mindspore import Tensor, mint, ops
from mindspore.communication import GlobalComm, create_group
from mindspore.mint.distributed import distributed

from tandem.backends.mindspore.device import prepare
from tandem.errors import UserError
from tandem.launch.member import NODE
from tandem.launch.world import World, is_scheduler
from tandem.parallel.grid import Grid, Place
from tandem.parallel.pipeline import after, before

Result = TypeVar("Result")

# After its last collective a rank must stay reachable until the others have finished theirs.
SECONDS_BEFORE_LEAVING = 1.0


class CommunicationError(RuntimeError):
    """A collective failed; the process cannot go on."""


class MindSporeCommunicator:
    """`tandem.launch.world.Communicator` over all processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._everyone = Ranks(GlobalComm.WORLD_COMM_GROUP, world.rank, world.size)

    def barrier(self) -> None:
        self._everyone.sum(mint.ones((1,), dtype=ms.float32))

    def all_gather(self, value: Any) -> list[Any]:
        return self._everyone.gather_values(value)

    def close(self) -> None:
        self.barrier()
        time.sleep(SECONDS_BEFORE_LEAVING)


def connect(world: World, device: str | None, timeout_minutes: float) -> MindSporeCommunicator:
    """Join the job that msrun started.

    Raises:
        UserError: the process was not started by msrun, the device is not there, or the others did not come.
    """
    if is_scheduler():
        serve()
    if "MS_ROLE" not in os.environ:
        raise UserError(f"MS_ROLE is not set: start the {world.size} processes with msrun, or with --nproc-per-node")
    # The default of 30 seconds is shorter than saving a checkpoint.
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(max(1, round(timeout_minutes * 60))))
    try:
        prepare(device)
    except RuntimeError as error:
        raise UserError(
            f"rank {world.rank} of {world.size} found no job at {os.environ.get('MS_SCHED_HOST')}:"
            f"{os.environ.get('MS_SCHED_PORT')}: {_first_line(error)}"
        ) from error
    _take_back(signal.SIGINT)
    # MindSpore's send takes its own rank from the group that is this default: HCCL's, which CPUs do not have.
    distributed.get_cache_group_rank.__defaults__ = (GlobalComm.WORLD_COMM_GROUP,)
    return MindSporeCommunicator(world)


def _take_back(number: signal.Signals) -> None:
    """Let the handler of this process's own have a signal again, at which MindSpore's server in it would end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.getsignal(number))


def serve() -> NoReturn:
    """Be msrun's scheduler, until the job ends."""
    # msrun starts one wherever the master's address is its own machine's: with two launchers on one, twice.
    if os.environ.get(NODE, "0") == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the ranks need it to save; it ends with them
        try:
            prepare("cpu")
        except RuntimeError:  # a rank has died, and says why itself
            sys.exit(1)
    sys.exit(0)


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks along one axis; `group` is None when it is alone there."""

    group: str | None = None
    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, in its own dtype; x is unchanged."""
        return _guarded("AllReduce", lambda: _all_reduce(self.group)(x))

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of the ranks' x, in place; a NaN may be lost."""
        _guarded("AllReduce", lambda: dist.all_reduce(x, op="max", group=self.group))
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, which have one shape."""
        found = [mint.empty(x.shape, dtype=x.dtype) for _ in range(self.size)]
        _guarded("AllGather", lambda: dist.all_gather(found, x, group=self.group))
        return found

    def gather_values(self, value: Any) -> list[Any]:
        """Every rank's value, of what JSON can hold."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        _guarded("AllGather", lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def sum_values(self, *values: float) -> list[float]:
        """Sums over the ranks, in double precision and in the same order everywhere."""
        return [sum(column) for column in zip(*self.gather_values(list(values)))]


@dataclass(frozen=True)
class Groups:
    """Who this rank talks with.

    Attributes:
        tied: the first and the last stage's ranks that hold the same slice of a tied embedding.
        channels: (from rank, to rank) -> a group of neighbouring stages, which carries messages in that direction only.
    """

    everyone: Ranks
    tensor: Ranks
    data: Ranks
    tied: Ranks
    channels: dict[tuple[int, int], str]


def make_groups(grid: Grid, rank: int, *, tied: bool) -> Groups:
    """The groups of `rank`; every rank calls this at the same time."""
    if grid.size == 1:
        return Groups(Ranks(), Ranks(), Ranks(), Ranks(), {})
    place = grid.place(rank)
    ends = [grid.rank(Place(place.tensor, place.data, stage)) for stage in (0, grid.pipeline_size - 1)]
    has_tied = tied and grid.pipeline_size > 1 and rank in ends
    return Groups(
        Ranks(GlobalComm.WORLD_COMM_GROUP, rank, grid.size),
        _ranks(grid.group("tensor", place), rank),
        _ranks(grid.group("data", place), rank),
        _ranks(ends, rank) if has_tied else Ranks(),
        _channels(grid, place),
    )


def send(x: Tensor, rank: int, channel: str) -> Any:
    """Returns what must be kept, with x, until everything has been sent."""
    return _guarded("Send", lambda: dist.isend(x, rank, group=channel))


def receive(x: Tensor, rank: int, channel: str) -> Tensor:
    """Fill x."""
    _guarded("Receive", lambda: dist.recv(x, rank, group=channel))
    return x


def _ranks(members: list[int], rank: int) -> Ranks:
    if len(members) == 1:
        return Ranks()
    return Ranks(_group("-".join(map(str, members)), tuple(members)), members.index(rank), len(members))


def _channels(grid: Grid, place: Place) -> dict[tuple[int, int], str]:
    """Both ends of a channel create it: in the sorted order of channels, which is the same everywhere."""
    own, wanted = grid.rank(place), set()
    for link in (before(place.pipeline, 0, grid.pipeline_size), after(place.pipeline, 0, grid.pipeline_size, 1)):
        if link is not None:
            other = grid.rank(Place(place.tensor, place.data, link.stage))
            wanted |= {(own, other), (other, own)}
    return {ends: _group(f"{ends[0]}>{ends[1]}", tuple(sorted(ends))) for ends in sorted(wanted)}


@functools.cache
def _group(name: str, members: tuple[int, ...]) -> str:
    """Engines of one job share their groups, which last as long as the process."""
    _guarded("creating a group", lambda: create_group(name, list(members)))
    return name


@functools.cache
def _all_reduce(group: str) -> ops.AllReduce:
    return ops.AllReduce(group=group)


_failure: list[str] = []


def _guarded(what: str, call: Callable[[], Result]) -> Result:
    """The result of a call that involves other ranks; none is made after one has failed.

    Raises:
        CommunicationError: it failed, or an earlier one did.
    """
    if _failure:
        raise CommunicationError(f"{what}: not tried, because an earlier {_failure[0]}")
    try:
        return call()
    except RuntimeError as error:
        _failure.append(f"{what} failed: {_first_line(error)}")
        seconds = os.environ.get("MS_CPU_COMM_OP_TIMEOUT")
        raise CommunicationError(
            f"{what} failed: another rank has ended, or came more than {seconds} s late "
            f"(--distributed-timeout-minutes): {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
