"""Data ranks that communicate while passes compute get the bits of those that do it afterwards."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from jobs import Case, run_job

from frameworks import require_framework

BRIEF = Case(dp=2, use_distributed_optimizer=True, tied=False, packed=True, idle=True, steps=3, micro_batches=4)
SHARDED = {"use_distributed_optimizer": True, "packed": True}
CASES = {
    2: [
        Case(dp=2, packed=True),
        Case(dp=2, **SHARDED, recompute_layers=2),
        Case(dp=2, **SHARDED, fp16=True),
        Case(dp=2, **SHARDED, adapters="dora"),
        Case(dp=2, use_torch_fsdp2=True),
    ],
    4: [
        Case(tp=2, dp=2, **SHARDED, sequence_parallel=True, tied=False),
        Case(tp=2, dp=2, idle=True),
        Case(pp=2, dp=2, **SHARDED, idle=True),
        Case(pp=2, dp=2, vpp=1, use_distributed_optimizer=True),
        Case(dp=4, **SHARDED, family="qwen3_moe", ep=2, balance=0.01),
    ],
}


def test_bits_are_the_same(tmp_path: Path) -> None:
    check([BRIEF], tmp_path)


@pytest.mark.slow("layouts")
@pytest.mark.parametrize("processes", list(CASES))
def test_bits_are_the_same_in_more_layouts(processes: int, tmp_path: Path) -> None:
    check(CASES[processes], tmp_path)


def check(cases: list[Case], folder: Path) -> None:
    require_framework("torch")
    meanwhile_cases = [replace(case, overlap=True) for case in cases]
    outcomes = run_job("torch", cases[0].processes, [*cases, *meanwhile_cases], folder)
    for after, meanwhile in zip(cases, meanwhile_cases):
        expected, found = (asdict(outcomes[case.name]) for case in (after, meanwhile))
        tensors, others = expected.pop("tensors"), found.pop("tensors")
        assert found == expected, after.name
        assert others.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(others[name], tensor, err_msg=f"{after.name}: {name}", strict=True)
