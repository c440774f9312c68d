"""The stand-in's collectives of Ascend (`fake_mindspore`): ranks are threads (`thread_ranks`).

Each checks what it is called with as MindSpore documents it. Here, sums are made in the order of ranks.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_tensor import Tensor, made
from thread_ranks import SECONDS, Meeting, rank

WORLD = "hccl"


class Job:
    """The groups of a job, and what its ranks called.

    Attributes:
        calls: rank, collective, group, and shapes of what is sent and of what comes back.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, str, tuple[int, ...], tuple[int, ...]]] = []
        self.messages: defaultdict[str, queue.Queue[np.ndarray]] = defaultdict(queue.Queue)
        self._groups: dict[str, Meeting] = {}
        self._lock = threading.Lock()

    def begin(self, size: int) -> None:
        """Groups stay as they are named: the backend creates each but once."""
        self.calls.clear(), self.messages.clear()
        self._groups = {name: Meeting(group.members) for name, group in self._groups.items()}
        self._groups[WORLD] = Meeting(range(size))

    def create_group(self, name: str, members: list[int]) -> None:
        with self._lock:
            self._groups.setdefault(name, Meeting(members))

    def meeting(self, group: str) -> Meeting:
        return self._groups[group]

    def called(self, name: str, group: str, sent: Tensor, received: Tensor) -> None:
        self.calls.append((rank(), name, group, tuple(sent.shape), tuple(received.shape)))


JOB = Job()


def _brought(x: Tensor, group: str) -> list[np.ndarray]:
    assert x.values is not None
    return JOB.meeting(group).exchange(x.values.copy())


class AllReduce:
    def __init__(self, op: str = "sum", group: str = WORLD) -> None:
        assert op == "sum"
        self.group = group

    def __call__(self, x: Tensor) -> Tensor:
        values = sum(_brought(x, self.group))
        result = made("all_reduce", x.shape, x.dtype, [], lambda: values)
        JOB.called("AllReduce", self.group, x, result)
        return result


def all_reduce(tensor: Tensor, op: str = "sum", group: str = WORLD) -> None:
    reduce: Callable[..., np.ndarray] = {"sum": np.add, "max": np.maximum}[op].reduce
    values = reduce(_brought(tensor, group))
    assert tensor.values is not None
    tensor.values[...] = values
    JOB.called("AllReduce", group, tensor, tensor)


def all_gather(tensor_list: Sequence[Tensor], tensor: Tensor, group: str = WORLD) -> None:
    assert all((one.shape, one.dtype) == (tensor.shape, tensor.dtype) for one in tensor_list)
    for target, values in zip(tensor_list, _brought(tensor, group), strict=True):
        assert target.values is not None
        target.values[...] = values
    JOB.called("AllGather", group, tensor, tensor)


def all_gather_object(object_list: list[Any], obj: Any, group: str = WORLD) -> None:
    object_list[:] = JOB.meeting(group).exchange(obj)


def reduce_scatter_tensor(output: Tensor, input: Tensor, op: str = "sum", group: str = WORLD) -> None:
    meeting = JOB.meeting(group)
    assert op == "sum"
    assert output.dtype == input.dtype
    assert input.is_contiguous
    assert input.shape == (output.shape[0] * len(meeting.members), *output.shape[1:])
    values = sum(_brought(input, group))
    assert output.values is not None
    output.values[...] = values[meeting.place * output.shape[0] :][: output.shape[0]]
    JOB.called("ReduceScatter", group, input, output)


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: list[int],
    input_split_sizes: list[int],
    group: str = WORLD,
) -> None:
    assert (sum(output_split_sizes), sum(input_split_sizes)) == (output.shape[0], input.shape[0])
    assert output.dtype == input.dtype
    place, ends = JOB.meeting(group).place, np.cumsum(input_split_sizes)[:-1]
    assert input.values is not None
    brought = JOB.meeting(group).exchange(np.split(input.values.copy(), ends))
    parts = [of_rank[place] for of_rank in brought]
    assert [len(part) for part in parts] == output_split_sizes
    assert output.values is not None
    output.values[...] = np.concatenate(parts)
    JOB.called("AllToAll", group, input, output)


def isend(tensor: Tensor, dst: int, group: str) -> Any:
    assert tensor.values is not None
    JOB.messages[f"{group} to {dst}"].put(tensor.values.copy())
    return SimpleNamespace(wait=lambda: None)


def recv(tensor: Tensor, src: int, group: str) -> None:
    values = JOB.messages[f"{group} to {rank()}"].get(timeout=SECONDS)
    assert math.prod(values.shape) == math.prod(tensor.shape)
    assert tensor.values is not None
    tensor.values[...] = values


FUNCTIONS = (all_reduce, all_gather, all_gather_object, reduce_scatter_tensor, all_to_all_single, isend, recv)
