"""PyTorch's kernels for Ascend with several ranks, which are threads over stand-ins for torch_npu and HCCL.

PyTorch calls the stand-in as it calls the group that torch_npu registers. Results are compared with the CPU's of one
process.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from device_toys import FakeNpu, compute_with, ignore_scales  # noqa: E402
from jobs import (  # noqa: E402
    Case,
    assert_equal_to_one_process,
    engine_settings,
    gather,
    leave,
    micro_batches,
    one_process,
    toy_source,
    train,
)
from thread_ranks import Meeting, rank, run_ranks  # noqa: E402
from toy_work import mean_weights  # noqa: E402

from tandem.backends.torch import engine as engine_module  # noqa: E402
from tandem.backends.torch import overlap  # noqa: E402
from tandem.backends.torch.communication import Groups, Ranks  # noqa: E402
from tandem.backends.torch.compute import sets  # noqa: E402
from tandem.parallel.grid import Grid  # noqa: E402

SHORT = Case(steps=3, micro_batches=4)
EXPERTS = dataclasses.replace(SHORT, family="qwen3_moe", balance=0.02, packed=True)
CASES = [
    dataclasses.replace(SHORT, tp=2, dp=2, sequence_parallel=True, use_distributed_optimizer=True),
    dataclasses.replace(EXPERTS, dp=2, ep=2, use_distributed_optimizer=True, overlap=True, idle=True),
]
MORE = [
    dataclasses.replace(SHORT, tp=2, tied=False),
    dataclasses.replace(SHORT, dp=4, use_distributed_optimizer=True, idle=True),
    dataclasses.replace(EXPERTS, tp=2, dp=2, ep=4, etp=1, sequence_parallel=True, idle=True),
    dataclasses.replace(EXPERTS, tp=2, dp=2, ep=2, capacity=0.7),
]
DONE = SimpleNamespace(wait=lambda: None)


class StandIn:
    """One rank's end of a group of HCCL's: the methods that torch.distributed calls, in the form of its backends."""

    def __init__(self, meeting: Meeting, calls: list[Any]) -> None:
        self._meeting, self._calls = meeting, calls

    def _brought(self, name: str, sent: Any, received: Any) -> list[Any]:
        if rank() == 0:
            self._calls.append((name, tuple(sent.shape), tuple(received.shape)))
        assert sent.dtype != torch.float64, "Ascend's devices have no float64"
        assert sent.is_contiguous()
        return self._meeting.exchange(sent.detach().clone())

    def size(self) -> int:
        return len(self._meeting.members)

    def allreduce(self, tensors: list[Any], opts: Any) -> Any:
        (x,) = tensors
        brought = torch.stack(self._brought("all_reduce", x, x))
        x.copy_(brought.amax(0) if opts.reduceOp == torch.distributed.ReduceOp.MAX else brought.sum(0))
        return DONE

    def all_gather_single(self, output: Any, input: Any, opts: Any) -> Any:
        output.copy_(torch.cat(self._brought("all_gather", input, output)).view_as(output))
        return DONE

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any) -> Any:
        """`output` may be the part of `input` that the rank gets."""
        assert opts.reduceOp == torch.distributed.ReduceOp.SUM
        assert (output.shape[0] * self.size(), *output.shape[1:]) == input.shape  # as gloo asks
        total = torch.stack(self._brought("reduce_scatter", input, output)).sum(0)
        output.copy_(total.chunk(self.size())[self._meeting.place].view_as(output))
        return DONE

    def all_to_all_single(self, output: Any, input: Any, received: list[int], sent: list[int], opts: Any) -> Any:
        sizes = self._meeting.exchange(sent)
        brought = self._brought("all_to_all", input, output)
        place = self._meeting.place
        parts = [rows.split(of_rank)[place] for rows, of_rank in zip(brought, sizes)]
        assert [len(part) for part in parts] == received
        output.copy_(torch.cat(parts))
        return DONE


class Job:
    """The groups of a job. `calls`: name of a collective on rank 0, and shapes of what it sends and gets."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self._meetings: dict[tuple[int, ...], Meeting] = {}

    def begin(self, case: Case) -> Grid:
        grid = Grid(case.layout, case.processes)
        members = [range(grid.size)]
        for place in map(grid.place, range(grid.size)):
            members += [grid.group(axis, place) for axis in ("tensor", "data")]
            members += [grid.expert_group(axis, place) for axis in ("expert", "replica")]
            members.append(grid.model(grid.copy(place)))
        self.calls.clear()
        self._meetings = {(*of_group,): Meeting(of_group) for of_group in members}
        return grid

    def groups(self, grid: Grid, number: int, *, interleaved: bool) -> Groups:
        place = grid.place(number)

        def ranks(members: list[int]) -> Ranks:
            if len(members) == 1:
                return Ranks()
            stand_in: Any = StandIn(self._meetings[(*members,)], self.calls)
            return Ranks(stand_in, members.index(number), len(members))

        return Groups(
            ranks([*range(grid.size)]),
            ranks(grid.group("tensor", place)),
            ranks(grid.group("data", place)),
            ranks(grid.model(grid.copy(place))),
            ranks(grid.expert_group("expert", place)),
            ranks(grid.expert_group("replica", place)),
            {},
        )


@pytest.fixture
def hccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """The CPU computes as an Ascend device, and its ranks talk as such devices do."""
    job = Job()
    monkeypatch.setitem(sys.modules, "torch_npu", FakeNpu().module())
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    compute_with(monkeypatch, sets.NPU)
    ignore_scales(monkeypatch)
    monkeypatch.setattr(engine_module, "make_groups", job.groups)
    return job


def on_rank(case: Case, grid: Grid, number: int) -> Any:
    engine = engine_module.create(toy_source(case).config, engine_settings(case, grid, number))
    engine.load_weights(toy_source(case))
    return engine


def check(case: Case, folder: Path, request: pytest.FixtureRequest) -> None:
    one_process("torch", case.work)  # on the CPU's own kernels, and kept
    job: Job = request.getfixturevalue("hccl")
    grid = job.begin(case)

    def on(number: int) -> None:
        engine = on_rank(case, grid, number)
        data = slice(grid.place(number).data, None, grid.data_size)
        leave(train("torch", engine, case, number, data), engine, case, number, folder)

    run_ranks(case.processes, on)
    assert_equal_to_one_process(case, gather(case, folder), "torch")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_equal_one_process(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check(case, tmp_path, request)


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_ranks_in_more_layouts_equal_one_process(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check(case, tmp_path, request)


def one_step(case: Case, job: Job) -> tuple[Any, list[Any]]:
    """An engine of rank 0, and its collectives in one step."""
    grid = job.begin(case)
    batches = micro_batches(case, toy_source(case).config)[0]

    def on(number: int) -> Any:
        engine = on_rank(case, grid, number)
        data = slice(grid.place(number).data, None, grid.data_size)
        engine.train_step(batches[data], mean_weights(batches)[data], 1e-3, 0.1)
        return engine

    return run_ranks(case.processes, on)[0], job.calls


def test_gradients_of_data_ranks_are_scattered(hccl: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight's rows are padded to equal parts. Besides, only a few totals are summed."""
    monkeypatch.setattr(overlap, "SMALL", 0)  # so that each weight travels by itself
    engine, calls = one_step(dataclasses.replace(SHORT, dp=2, use_distributed_optimizer=True), hccl)
    expected = Counter(
        ((2 * -(-rows // 2), *columns), (-(-rows // 2), *columns))
        for rows, *columns in (shard.shape for shard in engine._shards.values())
    )
    assert Counter((sent, received) for name, sent, received in calls if name == "reduce_scatter") == expected
    assert all(sent <= (8,) for name, sent, _ in calls if name == "all_reduce")


def test_split_tokens_are_scattered(hccl: Job) -> None:
    """Where a block or the embedding ends, and where the gradient of the beginning of a block or the head does."""
    case = dataclasses.replace(SHORT, tp=2, sequence_parallel=True, micro_batches=1)
    _, calls = one_step(case, hccl)
    tokens, hidden = 16, toy_source(case).config.hidden_size
    scattered = [shapes for name, *shapes in calls if name == "reduce_scatter"]
    assert scattered == [[(tokens, hidden), (tokens // 2, hidden)]] * (4 * case.num_layers + 2)
