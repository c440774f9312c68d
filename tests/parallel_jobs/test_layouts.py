"""Any layout gives the losses, norms and weights of one process, on each backend under its own launcher."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from jobs import Case, assert_equal_to_one_process, run_job

from frameworks import require_framework

SHORT = {
    2: [
        Case(tp=2, sequence_parallel=True, packed=True),
        # Where there is almost no gradient, as of key biases, Adam makes steps of rounding errors: a smaller rate keeps
        # them small.
        Case(tp=2, family="qwen2", recompute_layers=2, lr=2e-4),
        Case(tp=2, tied=False, family="llama"),
        Case(tp=2, packed=True, weighted=True, lr=2e-4),
        Case(pp=2, packed=True),
        Case(pp=2, tied=False, num_layer_list=(1, 3), recompute_layers=1),
        Case(pp=2, noop_layers=(0, 5)),
        Case(pp=2, vpp=1, packed=True),
        Case(dp=2, packed=True),
        Case(dp=2, use_distributed_optimizer=True, tied=False),
        Case(dp=2, use_torch_fsdp2=True, packed=True, idle=True, recompute_layers=2),
        Case(dp=2, use_distributed_optimizer=True, packed=True, fp16=True),
    ],
    4: [
        Case(tp=2, pp=2, sequence_parallel=True, packed=True),
        Case(tp=2, dp=2, use_distributed_optimizer=True, sequence_parallel=True),
        Case(pp=2, dp=2, use_distributed_optimizer=True, packed=True, idle=True),
        Case(dp=4, use_torch_fsdp2=True, tied=False),
        Case(pp=2, dp=2, use_torch_fsdp2=True, packed=True, idle=True, vpp=1),
        Case(pp=4, packed=True),
    ],
}
# On a machine of two cores these take their time.
MORE = [
    Case(pp=2, dp=2, vpp=1),
    Case(tp=2, dp=2, use_torch_fsdp2=True, sequence_parallel=True),
    Case(tp=4, tied=False, packed=True),
    Case(pp=4, vpp=1, num_layers=8),
]


def brief(cases: list[Case]) -> list[Case]:
    """The quick suite's: half the steps, of half the micro-batches."""
    return [replace(case, steps=5, micro_batches=4) for case in cases]


def test_some_layouts_equal_one_process_on_pytorch(tmp_path: Path) -> None:
    """Every second of them. Sequence parallelism and FSDP2 come below, with adapters."""
    check(require_framework("torch"), 2, brief(SHORT[2][1::2]), tmp_path)


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        pytest.param(2, SHORT[2], marks=pytest.mark.slow("layouts"), id="2"),
        pytest.param(4, MORE, marks=pytest.mark.slow("layouts"), id="4"),
        pytest.param(4, SHORT[4], marks=pytest.mark.slow("eight"), id="4-short"),
    ],
)
def test_more_layouts_equal_one_process_on_pytorch(processes: int, cases: list[Case], tmp_path: Path) -> None:
    check(require_framework("torch"), processes, cases, tmp_path)


# MindSpore's collectives on CPU take milliseconds, so its short set is shorter: every mechanism once.
SHORTER = [
    Case(tp=2, sequence_parallel=True, packed=True, lr=2e-4),
    Case(pp=2, tied=False, num_layer_list=(1, 3), recompute_layers=1),
    Case(pp=2, vpp=1, packed=True, idle=True),
    Case(dp=2, use_distributed_optimizer=True, packed=True),
]
MORE_OF_MINDSPORE = {
    2: [
        Case(tp=2, packed=True, weighted=True, lr=2e-4),
        Case(pp=2, vpp=2, num_layers=8, tied=False, recompute_layers=3),
        *SHORTER,
    ],
    4: [
        Case(tp=2, pp=2, packed=True, noop_layers=(0, 5)),
        Case(tp=2, dp=2, family="qwen2", use_distributed_optimizer=True, lr=2e-4),
        Case(tp=2, pp=2, vpp=1, packed=True, idle=True, sequence_parallel=True),
    ],
}


@pytest.mark.slow("matrix-mindspore")
def test_some_layouts_equal_one_process_on_mindspore(tmp_path: Path) -> None:
    """Those of stages are with interleaved ones here."""
    some = [case for case in SHORTER if not case.num_layer_list]
    check(require_framework("mindspore"), 2, brief(some), tmp_path)


@pytest.mark.slow("layouts")
@pytest.mark.parametrize("processes", list(MORE_OF_MINDSPORE))
def test_more_layouts_equal_one_process_on_mindspore(processes: int, tmp_path: Path) -> None:
    check(require_framework("mindspore"), processes, MORE_OF_MINDSPORE[processes], tmp_path)


# Only adapters are trained.
ADAPTED = {
    ("torch", 2): [
        Case(tp=2, sequence_parallel=True, packed=True, adapters="dora"),
        Case(dp=2, use_torch_fsdp2=True, packed=True, idle=True, adapters="dora", recompute_layers=2),
    ],
    ("mindspore", 2): [Case(tp=2, sequence_parallel=True, packed=True, adapters="dora")],
}
MORE_ADAPTED = {
    ("torch", 2): [
        Case(tp=2, tied=False, family="qwen2", adapters="shared A", recompute_layers=2),
        Case(pp=2, packed=True, adapters="some"),
        Case(dp=2, use_distributed_optimizer=True, adapters="dropout"),
        Case(tp=2, adapters="dropout", sequence_parallel=True),
        Case(dp=2, use_distributed_optimizer=True, packed=True, fp16=True, adapters="lora"),
        Case(pp=2, vpp=1, adapters="lora"),
    ],
    ("torch", 4): [
        Case(tp=2, pp=2, packed=True, adapters="dora", sequence_parallel=True),
        Case(tp=2, dp=2, adapters="lora", use_torch_fsdp2=True),
    ],
    ("mindspore", 2): [
        Case(dp=2, use_distributed_optimizer=True, packed=True, adapters="shared A"),
        Case(tp=2, adapters="shared A", tied=False),
        Case(tp=2, adapters="dropout", sequence_parallel=True),
        Case(pp=2, packed=True, adapters="some", recompute_layers=1),
        Case(pp=2, vpp=1, packed=True, adapters="lora"),
    ],
    ("mindspore", 4): [Case(tp=2, pp=2, packed=True, adapters="dora", sequence_parallel=True)],
}


@pytest.mark.parametrize(
    ("framework", "processes"),
    [pytest.param(*job, marks=pytest.mark.slow("jobs")) for job in ADAPTED],
)
def test_adapters_in_some_layouts_equal_one_process(framework: str, processes: int, tmp_path: Path) -> None:
    check(require_framework(framework), processes, brief(ADAPTED[framework, processes]), tmp_path)


@pytest.mark.slow("layouts")
@pytest.mark.parametrize(("framework", "processes"), MORE_ADAPTED)
def test_adapters_in_more_layouts_equal_one_process(framework: str, processes: int, tmp_path: Path) -> None:
    check(require_framework(framework), processes, MORE_ADAPTED[framework, processes], tmp_path)


FP16 = {
    2: [
        Case(tp=2, sequence_parallel=True, packed=True, fp16=True),
        Case(pp=2, packed=True, recompute_layers=1, fp16=True),
        Case(dp=2, use_distributed_optimizer=True, packed=True, fp16=True),
    ],
    4: [Case(tp=2, pp=2, packed=True, fp16=True)],
}


@pytest.mark.slow("matrix")
@pytest.mark.parametrize("processes", list(FP16))
def test_layouts_in_fp16_equal_one_process(framework: str, processes: int, tmp_path: Path) -> None:
    check(framework, processes, FP16[processes], tmp_path)


# What is NaN on the second tensor rank, stage, or data rank.
SPOILED = {
    2: [Case(tp=2, spoiled="gradient"), Case(pp=2, spoiled="weight"), Case(dp=2, spoiled="gradient")],
    4: [
        Case(tp=2, dp=2, sequence_parallel=True, use_distributed_optimizer=True, spoiled="gradient"),
        Case(tp=2, pp=2, spoiled="gradient"),
        Case(tp=2, pp=2, spoiled="weight"),
    ],
}


@pytest.mark.parametrize(
    ("framework", "processes"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow("layouts")) for case in (("mindspore", 2), ("torch", 4))),
        *(pytest.param(*case, marks=pytest.mark.slow("jobs")) for case in (("torch", 2), ("mindspore", 4))),
    ],
)
def test_a_nan_on_one_rank_makes_all_skip_the_step(framework: str, processes: int, tmp_path: Path) -> None:
    """All report the same, and go on as one process does that skips the same step."""
    check(require_framework(framework), processes, brief(SPOILED[processes]), tmp_path)


@pytest.mark.slow("layouts")
def test_a_nan_in_sharded_weights_makes_all_skip_the_step(tmp_path: Path) -> None:
    cases = [Case(dp=2, use_torch_fsdp2=True, spoiled="weight"), Case(dp=2, use_torch_fsdp2=True, spoiled="gradient")]
    check(require_framework("torch"), 2, cases, tmp_path)


Switches = tuple[bool, bool, bool, bool, bool]  # sequence, sharded, fully sharded, tied, packed
ALL: list[Switches] = list(product((False, True), repeat=5))  # type: ignore[arg-type]
# Of eight processes: every pair of switches, where two and four have every combination.
PAIRS: list[Switches] = [(a, b, c, a != b, a != c) for a, b, c, _, _ in ALL[::4] if not (b and c)]
# On MindSpore two of them: everything that it has, and nothing.
ENDS: list[Switches] = [(False, False, False, True, False), (True, True, False, False, True)]


def matrix(processes: int, switches: list[Switches]) -> list[Case]:
    """Every TP{1,2,4} x PP{1,2,4} x DP{1,2} of so many processes, with the switches that matter there."""
    cases = []
    for tp, pp, dp in product((1, 2, 4), (1, 2, 4), (1, 2)):
        if tp * pp * dp != processes:
            continue
        for sequence, sharded, fully, tied, packed in switches:
            if (sharded and fully) or (fully and dp == 1):
                continue
            case = Case(
                tp=tp,
                pp=pp,
                dp=dp,
                sequence_parallel=sequence and tp > 1,
                use_distributed_optimizer=sharded and dp > 1,
                use_torch_fsdp2=fully,
                tied=tied,
                packed=packed,
                lr=2e-4,  # of thousands of numbers a few have almost no gradient: see SHORT
            )
            if case not in cases:
                cases.append(case)
    return cases


ROWS: list[Switches] = [switches for switches in ALL if not switches[-1]]
PACKED_ROWS: list[Switches] = [switches for switches in ALL if switches[-1]]


@pytest.mark.parametrize(
    ("processes", "switches"),
    [
        pytest.param(2, ALL, marks=pytest.mark.slow("matrix"), id="2"),
        pytest.param(4, ROWS, marks=pytest.mark.slow("matrix"), id="4"),
        pytest.param(4, PACKED_ROWS, marks=pytest.mark.slow("matrix"), id="4-packed"),
        pytest.param(8, PAIRS, marks=pytest.mark.slow("eight"), id="8"),
    ],
)
def test_the_layout_matrix_equals_one_process_on_pytorch(
    processes: int, switches: list[Switches], tmp_path: Path
) -> None:
    check(require_framework("torch"), processes, matrix(processes, switches), tmp_path, timeout=1200)


@pytest.mark.parametrize(
    "processes",
    [pytest.param(n, marks=pytest.mark.slow("eight" if n == 8 else "matrix-mindspore")) for n in (2, 4, 8)],
)
def test_the_layout_matrix_equals_one_process_on_mindspore(processes: int, tmp_path: Path) -> None:
    rest = [
        case for case in [*SHORT.get(processes, []), *MORE] if case.processes == processes and not case.use_torch_fsdp2
    ]
    check(require_framework("mindspore"), processes, matrix(processes, ENDS) + rest, tmp_path, timeout=1200)


def check(framework: str, processes: int, cases: list[Case], folder: Path, timeout: float = 300) -> None:
    outcomes = run_job(framework, processes, cases, folder, timeout)
    for case in cases:
        assert_equal_to_one_process(case, outcomes[case.name], framework)
