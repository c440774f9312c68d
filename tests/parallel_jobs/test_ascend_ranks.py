"""MindSpore's kernels for Ascend with several ranks, which are threads over a stand-in for MindSpore and HCCL.

Results are compared with PyTorch's of one process. No MindSpore is needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_mindspore
import numpy as np
import pytest
from fake_collectives import FUNCTIONS, JOB
from jobs import Case, assert_equal_to_one_process, engine_settings, gather, leave, micro_batches, toy_source, train
from test_ascend_kernels import OURS, on_ascend
from thread_ranks import run_ranks
from toy_work import mean_weights

from frameworks import require_framework
from tandem.parallel.grid import Grid

SHORT = Case(steps=3, micro_batches=4)
EXPERTS = dataclasses.replace(SHORT, family="qwen3_moe", balance=0.02, packed=True)
CASES = [
    dataclasses.replace(SHORT, tp=2, dp=2, sequence_parallel=True, use_distributed_optimizer=True, recompute_layers=2),
    dataclasses.replace(EXPERTS, dp=2, ep=2, use_distributed_optimizer=True, idle=True),
]
MORE = [
    dataclasses.replace(SHORT, tp=2, tied=False),
    dataclasses.replace(SHORT, tp=4, sequence_parallel=True, packed=True),
    dataclasses.replace(SHORT, dp=2),
    dataclasses.replace(SHORT, dp=4, use_distributed_optimizer=True, idle=True),
    dataclasses.replace(SHORT, pp=2, dp=2, use_distributed_optimizer=True),
    dataclasses.replace(EXPERTS, tp=2, dp=2, ep=4, etp=1, sequence_parallel=True, idle=True),
    dataclasses.replace(EXPERTS, tp=2, dp=2, ep=2, capacity=0.7),
    dataclasses.replace(EXPERTS, dp=4, ep=2, use_distributed_optimizer=True),
]


@pytest.fixture
def ascend() -> Iterator[fake_mindspore.Record]:
    with on_ascend() as record:
        yield record


def on_rank(case: Case, grid: Grid, rank: int) -> Any:
    """A rank's engine."""
    settings = dataclasses.replace(engine_settings(case, grid, rank), device="npu")
    engine = importlib.import_module(f"{OURS}.engine").create(toy_source(case).config, settings)
    engine.load_weights(toy_source(case))
    return engine


def run(case: Case, folder: Path) -> None:
    """Train on every rank, and leave what `gather` puts together."""
    grid = Grid(case.layout, case.processes)
    JOB.begin(case.processes)

    def on(rank: int) -> None:
        engine = on_rank(case, grid, rank)
        data = slice(grid.place(rank).data, None, grid.data_size)
        leave(train("mindspore", engine, case, rank, data), engine, case, rank, folder)

    run_ranks(case.processes, on)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_equal_pytorchs_one_process(case: Case, tmp_path: Path, ascend: fake_mindspore.Record) -> None:
    require_framework("torch")
    run(case, tmp_path)
    assert_equal_to_one_process(case, gather(case, tmp_path), "torch")


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_ranks_in_more_layouts_equal_pytorchs_one_process(
    case: Case, tmp_path: Path, ascend: fake_mindspore.Record
) -> None:
    require_framework("torch")
    run(case, tmp_path)
    assert_equal_to_one_process(case, gather(case, tmp_path), "torch")


def one_step(case: Case) -> list[Any]:
    """The collectives of one step on rank 0, whose engine has the shapes that are returned, too."""
    JOB.begin(case.processes)
    grid = Grid(case.layout, case.processes)
    batches = micro_batches(case, toy_source(case).config)[0]

    def on(rank: int) -> Any:
        engine = on_rank(case, grid, rank)
        data = slice(grid.place(rank).data, None, grid.data_size)
        engine.train_step(batches[data], mean_weights(batches)[data], 1e-3, 0.1)
        return engine

    engine, *_ = run_ranks(case.processes, on)
    return [engine, *([call[1:] for call in JOB.calls if call[0] == 0])]


def test_gradients_of_data_ranks_are_scattered(ascend: fake_mindspore.Record) -> None:
    """Each weight's rows are padded to equal parts. Nothing is summed on all ranks."""
    engine, *calls = one_step(dataclasses.replace(SHORT, dp=2, use_distributed_optimizer=True))
    expected = [
        ("ReduceScatter", "0-1", (2 * -(-rows // 2), *columns), (-(-rows // 2), *columns))
        for rows, *columns in (shard.shape for shard in engine._shards.values())
    ]
    assert [call for call in calls if call[0] == "ReduceScatter"] == expected
    assert "AllReduce" not in {call[0] for call in calls}


def test_split_tokens_are_scattered(ascend: fake_mindspore.Record) -> None:
    """Where a block or the embedding ends, and where the gradient of the beginning of a block or the head does."""
    case = dataclasses.replace(SHORT, tp=2, sequence_parallel=True, micro_batches=1)
    _, *calls = one_step(case)
    tokens, hidden = 16, toy_source(case).config.hidden_size
    scattered = [call for call in calls if call[0] == "ReduceScatter"]
    blocks = 2 * case.num_layers
    assert scattered == [("ReduceScatter", "0-1", (tokens, hidden), (tokens // 2, hidden))] * (2 * blocks + 2)
    assert not [call for call in calls if call[0] == "AllReduce" and call[2] == (tokens, hidden)]


def test_where_ranks_share_experts_a_layer_is_read_once(ascend: fake_mindspore.Record) -> None:
    """How many rows go between ranks. Nothing is copied to the device but each micro-batch."""
    case = dataclasses.replace(EXPERTS, dp=2, ep=2)
    counts = []
    for number in (2, 2, 4):  # the first makes the table of rotary angles
        ascend.clear()
        one_step(dataclasses.replace(case, micro_batches=number))
        counts.append((ascend.reads, ascend.copies))
    layers = case.num_layers - toy_source(case).config.dense_layers
    assert np.subtract(counts[2], counts[1]).tolist() == [2 * layers, 2]  # of one more micro-batch on each of two ranks


def test_the_stand_ins_collectives_are_mindspores() -> None:
    require_framework("mindspore")
    real = importlib.import_module("mindspore.mint.distributed")
    for function in FUNCTIONS:
        names = [list(inspect.signature(one).parameters) for one in (function, getattr(real, function.__name__))]
        assert set(names[0]) <= set(names[1]), function.__name__
