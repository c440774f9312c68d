"""MindSpore's collectives: joining the job that msrun started, and the groups of ranks in it.

On CPU, a collective that timed out leaves messages behind, which the next one adds up without an error. So the first
failure ends all communication of the process. All ranks of a `Ranks` call its methods, in the same order.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import mindspore as ms
import mindspore.mint.distributed as dist
from mindspore import Tensor, mint, ops
from mindspore.communication import GlobalComm, create_group
from mindspore.mint.distributed import distributed

from tandem.backends import hccl
from tandem.backends.mindspore.device import prepare
from tandem.backends.mindspore.memory import undefined
from tandem.backends.pipeline import Stage
from tandem.errors import UserError
from tandem.launch.machines import check_port
from tandem.launch.member import NODE
from tandem.launch.stopping import kept_handler
from tandem.launch.world import World, is_scheduler
from tandem.parallel.grid import Grid, Place
from tandem.parallel.layout import even_rows

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
        UserError: msrun did not start the process, the device is missing, or other processes did not join.
    """
    if is_scheduler():
        serve()
    if "MS_ROLE" not in os.environ:
        raise UserError(f"MS_ROLE is not set: start the {world.size} processes with msrun, or with --nproc-per-node")
    # The default of 30 seconds is shorter than saving a checkpoint.
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(max(1, round(timeout_minutes * 60))))
    hccl.wait_for(timeout_minutes)
    try:
        with kept_handler(signal.SIGINT):  # the handler of MindSpore's server in this process ends it
            prepare(device)
    except RuntimeError as error:
        raise UserError(
            f"rank {world.rank} of {world.size} found no job at {os.environ.get('MS_SCHED_HOST')}:"
            f"{os.environ.get('MS_SCHED_PORT')}: {_first_line(error)}"
        ) from error
    # MindSpore's send looks up its rank in this default group. Without the change it is HCCL's, which CPUs do not have.
    distributed.get_cache_group_rank.__defaults__ = (GlobalComm.WORLD_COMM_GROUP,)
    return MindSporeCommunicator(world)


def serve() -> NoReturn:
    """Be msrun's scheduler, until the job ends.

    Raises:
        UserError: its port is in use.
    """
    # msrun starts a scheduler on every machine that has the master's address: two, with two launchers on one machine.
    if os.environ.get(NODE, "0") == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ranks need the scheduler while they save; it ends with them
        # Another program may have taken the port since the job began. The ranks would wait for the scheduler.
        check_port(os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"]))
        try:
            prepare("cpu")
        except RuntimeError:  # a rank has died, and reports why
            sys.exit(1)
    sys.exit(0)


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks along one axis. `group` is None when there is only one rank."""

    group: str | None = None
    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, in the dtype of x, which is unchanged."""
        return _guarded("AllReduce", lambda: _all_reduce(self.group)(x))

    def sum_rows(self, x: Tensor) -> Tensor:
        """This rank's rows (`even_rows`) of the sum of the ranks' x [n, ...]; not on CPU."""
        step = -(-x.shape[0] // self.size)
        first, last = even_rows(x.shape[0], self.size, self.rank)
        rows, whole = undefined((step, *x.shape[1:]), x.dtype), _padded(x, step * self.size)
        _guarded("ReduceScatter", lambda: dist.reduce_scatter_tensor(rows, whole, group=self.group))
        return rows if last - first == step else rows[: last - first]

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows of a tensor, from those of each rank (`even_rows`)."""
        whole = mint.cat(self.gather(_padded(rows, -(-count // self.size))), 0)
        return whole if whole.shape[0] == count else whole[:count]

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of the ranks' x, in place; a NaN may be lost."""
        _guarded("AllReduce", lambda: dist.all_reduce(x, op="max", group=self.group))
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x. All have the same shape."""
        tensors = [undefined(x.shape, x.dtype) for _ in range(self.size)]
        _guarded("AllGather", lambda: dist.all_gather(tensors, x, group=self.group))
        return tensors

    def gather_values(self, value: Any) -> list[Any]:
        """Every rank's value. JSON must be able to hold it."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        _guarded("AllGather", lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def sum_values(self, *values: float) -> list[float]:
        """Sums over the ranks, in double precision and in the same order everywhere."""
        return [sum(column) for column in zip(*self.gather_values(list(values)))]


@dataclass(frozen=True)
class Groups:
    """The groups of ranks that this rank talks with.

    Attributes:
        model: those that hold one copy of the model together.
        experts: those that share the experts of layers.
        copies: those that hold the same experts.
        tied: the first and the last stage's ranks that hold the same slice of a tied embedding.
        channels: (from rank, to rank, forward) -> a group of these two, which carries only activations in this
            direction when `forward`, and only their gradients otherwise.
    """

    everyone: Ranks
    tensor: Ranks
    data: Ranks
    model: Ranks
    experts: Ranks
    copies: Ranks
    tied: Ranks
    channels: dict[tuple[int, int, bool], str]


def make_groups(grid: Grid, rank: int, *, tied: bool, chunks: int) -> Groups:
    """The groups of `rank`, whose stage has `chunks` chunks. Every rank calls this at the same time."""
    if grid.size == 1:
        return Groups(Ranks(), Ranks(), Ranks(), Ranks(), Ranks(), Ranks(), Ranks(), {})
    place = grid.place(rank)
    ends = [grid.rank(Place(place.tensor, place.data, stage)) for stage in (0, grid.pipeline_size - 1)]
    has_tied = tied and grid.pipeline_size > 1 and rank in ends
    return Groups(
        Ranks(GlobalComm.WORLD_COMM_GROUP, rank, grid.size),
        _ranks(grid.group("tensor", place), rank),
        _ranks(grid.group("data", place), rank),
        _ranks(grid.model(grid.copy(place)), rank),
        _ranks(grid.expert_group("expert", place), rank),
        _ranks(grid.expert_group("replica", place), rank),
        _ranks(ends, rank) if has_tied else Ranks(),
        _channels(Stage(grid, place, chunks)),
    )


def _padded(x: Tensor, rows: int) -> Tensor:
    """x, with zeros below it."""
    missing = rows - x.shape[0]
    return mint.cat((x, mint.zeros((missing, *x.shape[1:]), dtype=x.dtype)), 0) if missing else x


def send(x: Tensor, rank: int, channel: str) -> Any:
    """Start to send x. The result and x must be kept until everything has been sent."""
    return _guarded("Send", lambda: dist.isend(x, rank, group=channel))


def receive(x: Tensor, rank: int, channel: str) -> Tensor:
    """Fill x with what `rank` sends."""
    _guarded("Receive", lambda: dist.recv(x, rank, group=channel))
    return x


def _ranks(members: list[int], rank: int) -> Ranks:
    if len(members) == 1:
        return Ranks()
    return Ranks(_group("-".join(map(str, members)), tuple(members)), members.index(rank), len(members))


def _channels(stage: Stage) -> dict[tuple[int, int, bool], str]:
    """Both ends of a channel create it. All ranks create channels in sorted order, so no two wait for each other.

    Two interleaved stages send both activations and gradients to each other. A channel carries one of these, so its
    messages are received in the order in which they are sent.
    """
    rank, channels = stage.grid.rank(stage.place), set()
    for chunk in range(stage.chunks):
        if (source := stage.source(chunk)) is not None:
            neighbour = stage.rank_of(source)
            channels |= {(neighbour, rank, True), (rank, neighbour, False)}
        if (target := stage.target(chunk)) is not None:
            neighbour = stage.rank_of(target)
            channels |= {(rank, neighbour, True), (neighbour, rank, False)}
    return {
        (first, second, forward): _group(
            f"{first}>{second}-{'activations' if forward else 'gradients'}", tuple(sorted((first, second)))
        )
        for first, second, forward in sorted(channels)
    }


@functools.cache
def _group(name: str, members: tuple[int, ...]) -> str:
    """Create a group once. Engines of one job share groups, which exist until the process ends."""
    _guarded("creating a group", lambda: create_group(name, list(members)))
    return name


@functools.cache
def _all_reduce(group: str) -> ops.AllReduce:
    return ops.AllReduce(group=group)


_failure: list[str] = []


def _guarded(operation: str, call: Callable[[], Result]) -> Result:
    """The result of a call that involves other ranks. After one call has failed, no other is made.

    Raises:
        CommunicationError: the call failed, or an earlier one did.
    """
    if _failure:
        raise CommunicationError(f"{operation}: not tried, because an earlier {_failure[0]}")
    try:
        return call()
    except RuntimeError as error:
        _failure.append(f"{operation} failed: {_first_line(error)}")
        seconds = os.environ.get("MS_CPU_COMM_OP_TIMEOUT")
        raise CommunicationError(
            f"{operation} failed: another rank has ended, or came more than {seconds} s late "
            f"(--distributed-timeout-minutes): {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
