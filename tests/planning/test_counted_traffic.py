"""What ranks really send in a train step on PyTorch, against the plan's formulas (within 1 %)."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.planning.traffic import stage_traffic

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZE = (4, 64, 128)  # layers, width, tokens


@pytest.mark.parametrize(
    "case",
    [
        (2, 1, 1, True, False, 2, 2),
        (1, 2, 2, False, True, 4, 0),
    ],
    ids=["tensor, sequence, recomputed", "pipeline, data, distributed optimizer"],
)
def test_ranks_send_what_is_planned(case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    require_framework("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan_parallel = importlib.import_module("plan_parallel")
    job = plan_parallel.job_of(case, *SIZE)
    ranks = plan_parallel.in_children(case, SIZE, job.devices, live=False)
    assert len(ranks) == job.devices
    for rank in ranks:
        traffic = stage_traffic(job, int(rank["stage"]))
        assert traffic.tensor + traffic.pipeline + traffic.data == pytest.approx(rank["sent"], rel=0.01)
