"""What ranks really send and hold in train steps, against the plan's formulas."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from forking_launcher import launcher_for
from frameworks import require_framework
from tandem.planning.hardware import HARDWARE
from tandem.planning.memory import StageMemory, stage_memories
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
        pytest.param((1, 2, 2, False, "optimizer", 4, 0), marks=pytest.mark.slow("jobs")),
        pytest.param((1, 2, 2, False, "all", 6, 0), marks=pytest.mark.slow("jobs")),
    ],
    ids=["tensor, sequence, recomputed", "pipeline, data, distributed optimizer", "pipeline, data, fully sharded"],
)
def test_ranks_send_what_is_planned(
    case: tuple[Any, ...], plan_parallel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_parallel, "launcher_of", launcher_for)
    job = plan_parallel.job_of("torch", case, *SMALL)
    ranks = plan_parallel.in_children("torch", case, SMALL, live=False)
    assert len(ranks) == job.devices
    for rank in ranks:
        traffic = stage_traffic(job, int(rank["stage"]))
        assert traffic.tensor + traffic.pipeline + traffic.data == pytest.approx(rank["sent"], rel=0.01)


@pytest.mark.slow("sizes")
@pytest.mark.parametrize("recompute_layers", [0, 4])
def test_fully_sharded_ranks_hold_what_is_planned(recompute_layers: int, plan_parallel: ModuleType) -> None:
    planned, held = sizes(plan_parallel, "torch", (1, 1, 2, False, "all", 4, recompute_layers), MIDDLE, live=True)
    assert planned.peak - planned.retained == pytest.approx(held, rel=0.15)


@pytest.mark.slow("sizes")
@pytest.mark.parametrize(
    ("framework", "case"),
    [
        ("torch", (2, 1, 1, True, "nothing", 2, 0)),
        ("torch", (2, 1, 1, True, "nothing", 2, 8)),
        ("mindspore", (2, 1, 1, True, "nothing", 2, 0)),
        ("mindspore", (1, 1, 2, False, "optimizer", 4, 0)),
    ],
)
def test_processes_are_as_large_as_planned(framework: str, case: tuple[Any, ...], plan_parallel: ModuleType) -> None:
    """Resident memory, heap and all, as `--nproc-per-node` starts them."""
    planned, held = sizes(plan_parallel, require_framework(framework), case, LARGE, live=False)
    assert planned.peak == pytest.approx(held, rel=0.15)


def sizes(
    plan_parallel: ModuleType, framework: str, case: tuple[Any, ...], size: tuple[int, int, int], live: bool
) -> tuple[StageMemory, float]:
    """What the only stage is planned to hold, and what its fullest rank held, in bytes."""
    (planned,) = stage_memories(plan_parallel.job_of(framework, case, *size), HARDWARE["cpu"])
    return planned, plan_parallel.fullest(plan_parallel.in_children(framework, case, size, live), 0, "memory")
