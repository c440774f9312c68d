"""What ranks really send and hold in train steps on PyTorch, against the plan's formulas."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from frameworks import require_framework
from tandem.planning.hardware import HARDWARE
from tandem.planning.memory import stage_memories
from tandem.planning.traffic import stage_traffic

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# layers, width, tokens
SMALL, MIDDLE, LARGE = (4, 64, 128), (4, 384, 512), (8, 512, 1024)


@pytest.fixture
def plan_parallel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    require_framework("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plan_parallel")


@pytest.mark.parametrize(
    "case",
    [
        (2, 1, 1, True, "nothing", 2, 2),
        (1, 2, 2, False, "optimizer", 4, 0),
        (1, 2, 2, False, "all", 6, 0),
    ],
    ids=["tensor, sequence, recomputed", "pipeline, data, distributed optimizer", "pipeline, data, fully sharded"],
)
def test_ranks_send_what_is_planned(case: tuple[Any, ...], plan_parallel: ModuleType) -> None:
    job = plan_parallel.job_of("torch", case, *SMALL)
    ranks = plan_parallel.in_children("torch", case, SMALL, live=False)
    assert len(ranks) == job.devices
    for rank in ranks:
        traffic = stage_traffic(job, int(rank["stage"]))
        assert traffic.tensor + traffic.pipeline + traffic.data == pytest.approx(rank["sent"], rel=0.01)


@pytest.mark.parametrize("recompute_layers", [0, 4])
def test_fully_sharded_ranks_hold_what_is_planned(recompute_layers: int, plan_parallel: ModuleType) -> None:
    case = (1, 1, 2, False, "all", 4, recompute_layers)
    job = plan_parallel.job_of("torch", case, *MIDDLE)
    ranks = plan_parallel.in_children("torch", case, MIDDLE, live=True)
    (memory,) = stage_memories(job, HARDWARE["cpu"])
    assert memory.peak - memory.retained == pytest.approx(plan_parallel.fullest(ranks, 0, "memory"), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("recompute_layers", [0, 8])
def test_processes_that_split_tokens_are_as_large_as_planned(recompute_layers: int, plan_parallel: ModuleType) -> None:
    """Resident memory, heap and all, as `--nproc-per-node` starts them."""
    case = (2, 1, 1, True, "nothing", 2, recompute_layers)
    job = plan_parallel.job_of("torch", case, *LARGE)
    ranks = plan_parallel.in_children("torch", case, LARGE, live=False)
    (memory,) = stage_memories(job, HARDWARE["cpu"])
    assert memory.peak == pytest.approx(plan_parallel.fullest(ranks, 0, "memory"), rel=0.15)
