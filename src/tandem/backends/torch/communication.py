"""torch.distributed: joining a job, and the groups of ranks in it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.backends import hccl
from tandem.backends.torch.device import choose_device
from tandem.errors import UserError
from tandem.launch.world import World
from tandem.parallel.grid import Grid, Place

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
Group = dist.ProcessGroup


@dataclass
class _Job:
    """What groups of the job's ranks are made with.

    Attributes:
        backend: of the device. Only the group of all ranks also has one for the host.
        timeout: how long a rank waits for others. PyTorch gives groups 30 minutes, whatever the group of all ranks has.
    """

    backend: str | None = None
    timeout: timedelta | None = None


_JOB = _Job()  # that `connect` joins


class TorchCommunicator:
    """`tandem.launch.world.Communicator` over the job's default group of CPU processes."""

    def __init__(self, world: World, group: Group) -> None:
        self.world = world
        self._group = group

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        self.barrier()
        make_groups.cache_clear()
        dist.destroy_process_group()


def connect(world: World, device: str | None, timeout_minutes: float) -> TorchCommunicator:
    """Join the process group that torchrun announces.

    Raises:
        UserError: torchrun's variables are missing, or other processes did not join.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"{' and '.join(missing)} not set: start the {world.size} processes with torchrun")
    chosen = choose_device(device)
    if chosen.type != "cpu":
        getattr(torch, chosen.type).set_device(world.local_rank)
    hccl.wait_for(timeout_minutes)
    # Numbers that control the run are sent between CPUs, so that no device waits for them.
    _JOB.backend, _JOB.timeout = BACKENDS[chosen.type], timedelta(minutes=timeout_minutes)
    backend = "gloo" if chosen.type == "cpu" else f"cpu:gloo,{chosen.type}:{_JOB.backend}"
    try:
        _init_process_group(backend, _JOB.timeout)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"rank {world.rank} of {world.size} found no job at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {error}"
        ) from error
    assert dist.group.WORLD is not None
    return TorchCommunicator(world, dist.group.WORLD)


def _init_process_group(backend: str, timeout: timedelta) -> None:
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # With a fixed address, one torchrun keeps its store over a restart, with the addresses of the killed ranks.
        # (Several torchruns count restarts separately. They need its c10d rendezvous, which makes a store each time.)
        store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks along one axis. `group` is None when there is only one rank."""

    group: Group | None = None
    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Groups:
    """The groups of ranks that this rank talks with.

    Attributes:
        model: those that hold one copy of the model together.
        experts: those that share the experts of layers.
        copies: those that hold the same experts.
        pipelines: (messages are activations, messages go around) -> a group of all stages. Going around means from the
            last stage to the first, and for gradients back. So between two ranks a group carries messages in one
            direction only, and both sides reach them in the same order.
    """

    everyone: Ranks
    tensor: Ranks
    data: Ranks
    model: Ranks
    experts: Ranks
    copies: Ranks
    pipelines: dict[tuple[bool, bool], Group]


@functools.cache
def make_groups(grid: Grid, rank: int, *, interleaved: bool) -> Groups:
    """Create the groups of `rank`. Every rank calls this at the same time.

    Groups hold threads, sockets and, on devices, buffers: engines of one grid share them.

    Only its members create a group here. PyTorch identifies it by how many groups the process created before, so every
    rank must create equally many.
    """
    if grid.size == 1:
        return Groups(Ranks(), Ranks(), Ranks(), Ranks(), Ranks(), Ranks(), {})
    place = grid.place(rank)
    kinds = [(forward, around) for forward in (True, False) for around in ((False, True) if interleaved else (False,))]
    stages = grid.group("pipeline", place)
    everyone = Ranks(dist.group.WORLD, rank, grid.size)
    tensor, data = (_ranks(grid.group(axis, place), rank) for axis in ("tensor", "data"))
    is_split = grid.layout.expert_size > 1 or grid.layout.expert_tensor_size != grid.tensor_size
    return Groups(
        everyone,
        tensor,
        data,
        _ranks_of_a_copy(grid, place, everyone, tensor),
        _ranks(grid.expert_group("expert", place), rank),
        _ranks(grid.expert_group("replica", place), rank) if is_split else data,
        {kind: _group(stages) for kind in kinds} if len(stages) > 1 else {},
    )


def sum_over(ranks: Ranks, values: torch.Tensor) -> torch.Tensor:
    """The sums of a few numbers over `ranks`, in place, where they are."""
    if ranks.group is not None:
        dist.all_reduce(values, group=ranks.group)
    return values


def maximum_over(ranks: Ranks, value: int) -> int:
    """The largest of a number of the host over `ranks`, which are all of the job."""
    if ranks.group is None:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=ranks.group)
    return int(tensor)


def from_first(ranks: Ranks, value: Any) -> Any:
    """The value of the first of `ranks`, on all of them."""
    values = [value]
    if ranks.group is not None:
        dist.broadcast_object_list(values, group=ranks.group, group_src=0)
    return values[0]


def all_gather(whole: torch.Tensor, rows: torch.Tensor, group: Group | None) -> dist.Work:
    """Start to fill `whole` with the `rows` of every rank of a group, equally many each."""
    return _started(_all_gather(whole, rows, group=group, async_op=True))


def reduce_scatter(rows: torch.Tensor, whole: torch.Tensor, group: Group | None) -> dist.Work:
    """Start to sum `whole` over the ranks, and to put this rank's rows into `rows`, which may be a view of `whole`."""
    return _started(_reduce_scatter(rows, whole, group=group, async_op=True))


def all_reduce(x: torch.Tensor, group: Group | None) -> dist.Work:
    """Start to replace x by its sum over a group."""
    return _started(dist.all_reduce(x, group=group, async_op=True))


def exchange(x: torch.Tensor, send: list[int], receive: list[int], ranks: Ranks) -> torch.Tensor:
    """The rows that come from each rank, rank after rank; `send` of the rows of x [n, k] go to each, in their order."""
    received = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive, send, group=ranks.group)
    return received


def gather_counts(counts: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Every rank's counts [n], [ranks, n]."""
    gathered = counts.new_empty(ranks.size * len(counts))
    all_gather(gathered, counts, ranks.group).wait()
    return gathered.view(ranks.size, -1)


def most_sums(device: torch.device) -> int | None:
    """How many parts of a model may be summed at the same time, while passes compute; None for any number."""
    return 2 if device.type == "cpu" else None  # gloo copies what it sends


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the group"
    return work


# Names in PyTorch 2.13, and in older versions.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this process sends inside the context. For tests and benchmarks: it slows every operation.

    Collectives count as rings, as in `tandem.planning.traffic`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and function._opname in _SENDS:
            position, passes = _SENDS[function._opname]
            tensors = args[position] if isinstance(args[position], list) else [args[position]]
            group = next(Group.unbox(value) for value in args if isinstance(value, torch.ScriptObject))
            self.total += passes(group.size()) * sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


# c10d's operations -> the position of the whole tensor in the arguments, and how often one of n ranks sends it
_SENDS: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce_": (0, lambda ranks: 2 * _ring(ranks)),
    "_allgather_base_": (0, _ring),
    "_reduce_scatter_base_": (1, _ring),
    "send": (0, lambda ranks: 1.0),
    "alltoall_base_": (1, _ring),
}


def _ranks_of_a_copy(grid: Grid, place: Place, everyone: Ranks, tensor: Ranks) -> Ranks:
    """Those that hold one copy of the model together. A group that exists is used."""
    members = grid.model(grid.copy(place))
    if len(members) == everyone.size:
        return everyone
    return tensor if len(members) == tensor.size else _ranks(members, grid.rank(place))


def _ranks(members: list[int], rank: int) -> Ranks:
    if len(members) == 1:
        return Ranks()
    return Ranks(_group(members), members.index(rank), len(members))


def _group(members: list[int]) -> Group:
    group = dist.new_group(members, _JOB.timeout, _JOB.backend, use_local_synchronization=True)
    assert isinstance(group, Group)
    return group
