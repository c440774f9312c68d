"""Whole runs in which the batch grows: the sizes of Megatron, and resuming inside the ramp."""

from __future__ import annotations

from pathlib import Path

import pytest

from frameworks import require_framework
from runs import assert_same_weights, run
from tandem.training.logs.log import StepRecord
from workspace import Workspace

RAMP = {
    "train_iters": None,
    "train_samples": 64,
    "global_batch_size": 8,
    "rampup_batch_size": [2, 2, 24],
    "lr_warmup_iters": 0,
    "lr_warmup_samples": 8,
}
# Megatron-core's calculator: 3 increments, one for each 8 of the first 24 samples; beyond 24 the full size; the last
# partial batch of the 64 is thrown away.
SIZES = [2, 2, 2, 2, 4, 4, 6, 6, 8, 8, 8, 8]


@pytest.mark.parametrize(
    ("framework", "instructions", "stop"),
    [
        *(("torch", *case) for case in ((False, 3), (False, 9), (True, 6))),
        ("mindspore", True, 6),
        *(pytest.param("torch", *case, marks=pytest.mark.slow("sizes")) for case in ((False, 6), (True, 3), (True, 9))),
        *(pytest.param("mindspore", *case, marks=pytest.mark.slow("sizes")) for case in ((False, 3), (True, 9))),
    ],
)
def test_a_ramp_is_resumed_exactly(
    workspace: Workspace, framework: str, instructions: bool, stop: int, tmp_path: Path
) -> None:
    """Inside each part of the ramp."""
    require_framework(framework)
    common = {"instructions": instructions, "save_interval": 4, **RAMP}
    whole, parts = list[StepRecord](), list[StepRecord]()
    run(workspace, framework, whole.append, save=str(tmp_path / "a"), **common)
    run(workspace, framework, parts.append, save=str(tmp_path / "b"), exit_interval=stop, **common)
    assert [record.iteration for record in parts] == list(range(1, stop + 1))
    run(workspace, framework, parts.append, save=str(tmp_path / "b"), **common)
    assert [record.batch_size for record in whole] == SIZES
    assert whole[-1].consumed_samples == sum(SIZES) <= 64
    for one, other in zip(whole, parts, strict=True):
        assert (one.consumed_samples, one.batch_size, one.lr, one.loss) == (
            other.consumed_samples,
            other.batch_size,
            other.lr,
            other.loss,
        )
    assert_same_weights(tmp_path / "a", tmp_path / "b")
