"""Mixtures of experts in any layout: the losses, norms and weights of one process, with the balancing losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import Case, assert_equal_to_one_process, run_job

from frameworks import require_framework


def moe(micro_batches: int = 4, **values: Any) -> Case:
    """Routing is not continuous: a token whose two experts are nearly equal may go to another. A small rate keeps the
    weights of both runs, and so their routes, together."""
    return Case(family="qwen3_moe", lr=2e-4, balance=0.05, steps=5, micro_batches=micro_batches, **values)


SHORT = [moe(dp=2, ep=2, packed=True, idle=True, use_distributed_optimizer=True)]
OF_PYTORCH = [
    moe(dp=2, use_torch_fsdp2=True, packed=True, idle=True, recompute_layers=2),
    moe(dp=2, ep=2, packed=True, fp16=True),
]
MORE = {
    2: [
        moe(tp=2, packed=True, sequence_parallel=True),
        moe(tp=2, etp=1, packed=True, use_distributed_optimizer=True),
        moe(tp=2, ep=2, etp=1, packed=True, sequence_parallel=True, recompute_layers=2),
        moe(dp=2, packed=True, use_distributed_optimizer=True, idle=True),
        moe(dp=2, ep=2, packed=True, recompute_layers=2),
        moe(pp=2, packed=True),
        moe(pp=2, vpp=1, packed=True, idle=True),
        moe(dp=2, ep=2, packed=True, capacity=0.75),
        moe(tp=2, etp=1, packed=True, capacity=0.75),
    ],
    4: [
        moe(dp=4, ep=2, packed=True, use_distributed_optimizer=True, idle=True),
        moe(dp=4, ep=4),
        moe(tp=2, dp=2, ep=2, packed=True, sequence_parallel=True, use_distributed_optimizer=True),
        moe(tp=2, dp=2, ep=4, etp=1, packed=True, sequence_parallel=True),
        moe(tp=2, dp=2, ep=2, extend=True, packed=True, use_distributed_optimizer=True),
        moe(tp=4, ep=2, etp=1, packed=True, sequence_parallel=True),
        moe(pp=2, dp=2, ep=2, packed=True, idle=True),
        moe(pp=2, dp=2, ep=2, vpp=1, packed=True, idle=True),
    ],
}


def eight(tensor: int, stages: int, shared: int, **values: Any) -> Case:
    """A layout of eight processes, with a micro-batch or more for each data rank.

    Every second size of the group of experts has the distributed optimizer.
    """
    data = 8 // (tensor * stages)
    flags = {"packed": True, "sequence_parallel": tensor > 1, "use_distributed_optimizer": shared != 2}
    return moe(max(4, data), tp=tensor, pp=stages, dp=data, ep=shared, **flags, **values)


# All of EP 1, 2 and 4, TP 1 and 2, PP 1 and 2; tensor ranks cut experts, or hold whole ones.
EIGHT = [
    *(eight(1, 1, shared) for shared in (2, 4)),
    *(eight(1, 2, shared) for shared in (1, 2, 4)),
    *(eight(2, 1, shared) for shared in (1, 2, 4)),
    *(eight(2, 1, shared, etp=1) for shared in (1, 2, 4)),
    *(eight(2, 2, shared) for shared in (1, 2)),
    *(eight(2, 2, shared, etp=1) for shared in (1, 2, 4)),
]


ADAPTED = {
    2: [
        moe(adapters="lora", dp=2, ep=2, packed=True, idle=True, use_distributed_optimizer=True),
        moe(adapters="lora", tp=2, packed=True, sequence_parallel=True),
        moe(adapters="shared A", tp=2, packed=True),
        moe(adapters="shared A", tp=2, etp=1, packed=True, use_distributed_optimizer=True),
        moe(adapters="lora", tp=2, ep=2, etp=1, packed=True, sequence_parallel=True, recompute_layers=2),
        moe(adapters="lora", pp=2, vpp=1, packed=True),
    ],
    4: [
        moe(adapters="lora", tp=2, dp=2, ep=2, packed=True, sequence_parallel=True, use_distributed_optimizer=True),
        moe(adapters="shared A", tp=2, dp=2, ep=4, etp=1, packed=True, sequence_parallel=True),
        moe(adapters="lora", tp=2, dp=2, ep=2, extend=True, packed=True, use_distributed_optimizer=True),
    ],
}
ADAPTED_OF_PYTORCH = [
    moe(adapters="lora", dp=2, use_torch_fsdp2=True, packed=True, idle=True),
    moe(adapters="lora", dp=2, ep=2, packed=True, fp16=True),
]


@pytest.mark.parametrize("framework", ["torch", pytest.param("mindspore", marks=pytest.mark.slow("layouts"))])
def test_shared_experts_equal_one_process(framework: str, tmp_path: Path) -> None:
    check(require_framework(framework), 2, SHORT, tmp_path)


@pytest.mark.slow("layouts")
@pytest.mark.parametrize("processes", list(MORE))
@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_experts_in_more_layouts_equal_one_process(framework: str, processes: int, tmp_path: Path) -> None:
    check(require_framework(framework), processes, MORE[processes], tmp_path)


@pytest.mark.slow("eight")
def test_experts_in_layouts_of_eight_equal_one_process(framework: str, tmp_path: Path) -> None:
    check(framework, 8, EIGHT, tmp_path, timeout=1200)


@pytest.mark.slow("layouts")
def test_experts_in_layouts_that_only_pytorch_has(tmp_path: Path) -> None:
    check(require_framework("torch"), 2, OF_PYTORCH, tmp_path)


@pytest.mark.slow("layouts")
@pytest.mark.parametrize("processes", list(ADAPTED))
@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_adapters_of_experts_equal_one_process(framework: str, processes: int, tmp_path: Path) -> None:
    cases = ADAPTED[processes] + (ADAPTED_OF_PYTORCH if (framework, processes) == ("torch", 2) else [])
    check(require_framework(framework), processes, cases, tmp_path)


def check(framework: str, processes: int, cases: list[Case], folder: Path, timeout: float = 300) -> None:
    for case in cases:
        assert case.processes == processes, case.name
    outcomes = run_job(framework, processes, cases, folder, timeout)
    for case in cases:
        assert_equal_to_one_process(case, outcomes[case.name], framework)
