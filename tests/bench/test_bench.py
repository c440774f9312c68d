"""`tandem bench`: stages in processes of their own, one JSON file and one page."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faulty_stages import STAGES

from frameworks import require_framework
from tandem.__main__ import main
from tandem.backends.interface import Engine
from tandem.bench import run, speed
from tandem.bench.options import BenchOptions
from tandem.bench.parity import layout_parity
from tandem.bench.run import StageResult, bench
from tandem.bench.stages import Stage, stages
from tandem.bench.team import ALONE, Team
from tandem.errors import UserError
from tandem.launch.machines import Machines
from tandem.models.tensors import FINAL_NORM
from tandem.planning.counted import COUNTED


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(options: BenchOptions, stage: Stage) -> StageResult:
        if stage.name == "clipping":
            return StageResult(stage.name, stage.shows, None, "RuntimeError: <no kernel>", 1.0)
        return StageResult(stage.name, stage.shows, {"tokens/s": 12345.6, "memory": 2**31}, "", 1.0)

    monkeypatch.setattr(run, "_run", result)
    output = tmp_path / "bench.json"
    results = bench(BenchOptions(output=str(output), sizes=("0.6B",), micro_batch_sizes=(1,), device="cpu"))
    names = ["parity", "clipping", "transformers", "0.6B, micro-batch 1", "0.6B, packed", "0.6B, profile"]
    assert [one.name for one in results] == names
    assert [stage["name"] for stage in json.loads(output.read_text())["stages"]] == names
    page = (tmp_path / "bench.html").read_text()
    assert "RuntimeError: &lt;no kernel&gt;" in page
    assert "12,346" in page
    assert "2.00 GiB" in page


def test_what_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nsleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    result = run._run(BenchOptions(stage_seconds=1), stages(BenchOptions())[0])
    assert result.figures is None
    assert result.error == "stopped after 1 s"


def test_a_process_that_dies_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    result = run._run(BenchOptions(), stages(BenchOptions())[0])
    assert result.figures is None
    assert result.error == "ended with code 9: out of memory"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--output", "bench.txt"], "--output bench.txt"),
        (["--documents", "9", "--seq-length", "8"], "--documents 9"),
        (["--sizes", "5B"], "5B"),
        (["--layouts", "tp2-dp0"], "--layouts tp2-dp0: 'dp0' is unknown"),
        (["--layouts", "dp2-dp4"], "'dp4' is unknown, or there twice"),
        (["--layouts", "tp2-distopt"], "distopt has no effect without dp2 or more"),
        (["--layouts", "dp2", "dp2"], "dp2 given twice"),
        (["--layouts", "dp2", "tp3", "--sizes", "8B"], "--layouts tp3, 8B: tp3: the model's num_query_groups 8"),
        (["--layouts", "pp4", "--num-layers", "2"], "--layouts pp4, 0.6B: pp4: 2 layers"),
        (["--layouts", "dp2-ep2"], "the model has no experts"),
        (["--layouts", "dp2-fsdp2", "--ai-framework", "mindspore"], "--use-torch-fsdp2 needs torch"),
    ],
)
def test_wrong_options_are_refused(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert named in capsys.readouterr().err


def test_layouts_fit_the_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_framework("torch")
    monkeypatch.setattr(run, "probe", lambda name: {"count": 8, "devices": "8 x NVIDIA H200"})
    options = BenchOptions(ai_framework="torch", output=str(tmp_path / "bench.json"))
    chosen = run.choose_layouts(options)
    assert chosen.layouts == ("dp1", "dp8-distopt-overlap", "tp8-sp", "tp2-dp4-sp-distopt-overlap")
    names = [stage.name for stage in stages(chosen)]
    assert names[3:6] == ["dp8-distopt-overlap, parity", "tp8-sp, parity", "tp2-dp4-sp-distopt-overlap, parity"]
    assert "0.6B, tp8-sp, micro-batch 4" in names
    # 30B-A3B has four key/value heads, and so no eight tensor ranks.
    with_experts = run.choose_layouts(dataclasses.replace(options, sizes=("0.6B", "30B-A3B")))
    assert with_experts.layouts == ("dp1", "dp8-distopt-overlap", "tp2-dp4-sp-distopt-overlap")
    with pytest.raises(UserError, match=r"--layouts tp4-dp4: has 16 processes, and this machine 8 x NVIDIA H200"):
        bench(dataclasses.replace(options, layouts=("dp8", "tp4-dp4")))
    assert not (tmp_path / "bench.json").exists()
    on_cpu = dataclasses.replace(options, layouts=("tp4-dp4",), device="cpu")
    assert run.choose_layouts(on_cpu) == on_cpu


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("killed", "rank 1 of 2 was killed, or crashed"),
        pytest.param(
            *("error", "rank 1 of 2 failed: RuntimeError: no kernel for this"), marks=pytest.mark.slow("kills")
        ),
        ("hang", "stopped after 5 s"),
    ],
)
def test_a_rank_that_ends_or_hangs_is_said_and_the_next_stage_runs(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).with_name("faulty_stages.py")
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(run, "worker", lambda file: [str(script), file])
    monkeypatch.setattr(run, "stages", lambda options: STAGES)
    monkeypatch.setattr(run, "launcher_of", lambda framework: plain_launcher)
    output = tmp_path / "bench.json"
    assert main(["bench", "--device", "cpu", "--stage-seconds", "5", "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert f"faulty, dp2: failed: {reason}\n" in printed.out
    assert "stages that failed: faulty, dp2." in printed.err
    faulty, after = json.loads(output.read_text())["stages"]
    assert faulty["figures"] is None
    assert after["figures"] == {"layout": "tp2", "largest": 1.0}
    assert reason in output.with_suffix(".html").read_text()


def test_a_layout_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second engine, that of the layout, has one gradient that is a thousandth too large."""
    require_framework("torch")
    options, build, built = BenchOptions(ai_framework="torch", device="cpu"), Team.engine, []
    assert layout_parity(options, ALONE)["the same in fp32"] is True

    def engine(*arguments: Any, **settings: Any) -> Engine:
        made = build(*arguments, **settings)
        built.append(made)
        compute = made.loss_and_gradients

        def changed(*batches: Any) -> tuple[float, dict[str, np.ndarray]]:
            loss, gradients = compute(*batches)
            return loss, {**gradients, FINAL_NORM: gradients[FINAL_NORM] * 1.001}

        if len(built) == 2:
            monkeypatch.setattr(made, "loss_and_gradients", changed)
        return made

    monkeypatch.setattr(Team, "engine", engine)
    found = layout_parity(options, ALONE)
    assert found["fp32 gradient difference"] == pytest.approx(1e-3, rel=1e-3)
    assert found["the same in fp32"] is False


def plain_launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Two ranks of a shell, without a framework."""
    rank = shlex.join([sys.executable, *words])
    return ["sh", "-c", f"RANK=0 LOCAL_RANK=0 {rank} & RANK=1 LOCAL_RANK=1 {rank} & wait"], {"WORLD_SIZE": "2"}


def test_no_other_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("my own page")
    with pytest.raises(UserError, match=r"mine\.html"):
        bench(BenchOptions(output=str(tmp_path / "mine.json")))
    assert (tmp_path / "mine.html").read_text() == "my own page"


def test_kernels_copies_and_waits_are_counted() -> None:
    require_framework("torch")
    from torch.autograd import DeviceType

    from tandem.backends.torch.profiling import by_module, count

    def event(name: str, device: DeviceType = DeviceType.CPU, parent: SimpleNamespace | None = None) -> SimpleNamespace:
        spent = {"self_cpu_time_total": 2e6, "self_device_time_total": 3e6 if name == "aten::mm" else 0.0}
        return SimpleNamespace(name=name, device_type=device, cpu_parent=parent, **spent)

    outer = event("aten::linear")
    of_host = [outer, event("aten::mm", parent=outer), event("_Linear"), event("aten::add")]
    events = [
        *of_host,
        *(event("cudaLaunchKernel"), event("cudaStreamSynchronize"), event("cudaDeviceSynchronize")),
        *(event("sm90_gemm", DeviceType.CUDA), event("triton_red_fused", DeviceType.CUDA)),
        *(event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA), event("Memset (Device)", DeviceType.CUDA)),
    ]
    assert count(events) == {"kernels": 2, "copies to the device": 1, "waits": 2}
    assert by_module(events) == {"everything else": 3.0}
    # A run on the processors of a machine with a device, or on one that the profiler does not see into.
    assert count(of_host) == {"operators": 2}  # linear and add
    assert by_module(of_host) == {"everything else": 6.0, "linear layers": 2.0}


WITHOUT_PACKAGES = """
import json, sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
import tandem.bench.worker
from tandem.__main__ import main
from tandem.bench.options import BenchOptions
from tandem.bench.stages import stages
from tandem.bench.team import ALONE
options = BenchOptions(device="cpu")
figures = [stage.run(options, ALONE) for stage in stages(options) if stage.name in ("parity", "transformers")]
print(json.dumps(figures, default=float))
main(["bench", "--help"])
"""


def test_it_needs_the_framework_and_numpy_alone() -> None:
    """Without transformers a stage is left out. That is no failure."""
    absent = {"tokenizers", "orjson", "pyarrow", "jinja2", "yaml", "rich", "matplotlib", "transformers", "safetensors"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES.format(absent=absent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures, help_text = done.stdout.split("\n", 1)
    assert "--micro-batch-sizes" in help_text
    parity, against_transformers = json.loads(figures)
    assert parity["the same in fp32"]
    assert against_transformers == {"left out": "it needs transformers, from version 4.51 on, and PyTorch"}


def test_a_stage_that_is_left_out_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = StageResult("transformers", "a toy", {"left out": "it needs transformers"}, "", 0.1)
    monkeypatch.setattr(run, "stages", lambda options: [left_out])
    monkeypatch.setattr(run, "_run", lambda options, stage: stage)
    assert main(["bench", "--device", "cpu", "--output", str(tmp_path / "bench.json")]) == 0
    assert "transformers: left out it needs transformers\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("framework", "device", "maker"),
    [
        ("torch", "NVIDIA A100-SXM4-80GB", "nvidia"),
        ("torch", "Ascend910B2", "ascend"),
        ("torch", "cpu", "nvidia"),
        ("mindspore", "Ascend910B2", "ascend"),
        ("mindspore", "cpu", "ascend"),
    ],
)
def test_planned_kernels_are_those_of_the_devices_maker(framework: str, device: str, maker: str) -> None:
    options = BenchOptions(ai_framework=framework, num_layers=1, seq_length=64, documents=8)
    counted = COUNTED[framework, maker]
    of_step = counted.layer + counted.chunk + counted.micro_batch + counted.update + counted.step
    assert speed._planned_kernels(options, ALONE, options.config("0.6B"), device) == of_step


@pytest.mark.slow("answers")
@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_all_stages_on_the_cpu(framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    short = ["--num-layers", "1", "--seq-length", "64", "--micro-batch-sizes", "1", "--documents", "8", "--steps", "1"]
    code = main(["bench", "--ai-framework", framework, "--device", "cpu", *short, "--output", str(output)])
    assert code == 0, capsys.readouterr()
    stages = {stage["name"]: stage["figures"] for stage in json.loads(output.read_text())["stages"]}
    assert stages["parity"]["the same in fp32"] is True
    assert stages["clipping"]["clips as the CPU"] is True
    assert stages["clipping"]["skips"] is True
    assert stages["transformers"]["the same in fp32"] is True
    assert stages["0.6B, packed"]["tokens/s"] > 0
    assert stages["0.6B, profile"]["operators"] > 10
    assert stages["0.6B, profile"]["planned kernels"] > 10


@pytest.mark.slow("answers")
@pytest.mark.parametrize(("framework", "layout"), [("torch", "dp2-distopt-overlap"), ("mindspore", "tp2-sp")])
def test_a_layout_of_two_processes(
    framework: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with one process, trained and profiled. Without the stages of one process, to take less time."""
    of_layout = [f"{layout}, parity", f"0.6B, {layout}, micro-batch 1", f"0.6B, {layout}, profile"]
    monkeypatch.setattr(run, "stages", lambda options: [stage for stage in stages(options) if stage.name in of_layout])
    output = tmp_path / "bench.json"
    short = ["--num-layers", "1", "--seq-length", "16", "--micro-batch-sizes", "1", "--documents", "2", "--steps", "1"]
    words = ["--layouts", layout, "--device", "cpu", *short, "--output", str(output)]
    assert main(["bench", "--ai-framework", framework, *words]) == 0, capsys.readouterr()
    figures = {stage["name"]: stage["figures"] for stage in json.loads(output.read_text())["stages"]}
    assert list(figures) == of_layout
    assert figures[f"{layout}, parity"]["the same in fp32"] is True
    assert 0 < figures[f"{layout}, parity"]["fp32 gradient difference"] < 1e-4
    measured = figures[f"0.6B, {layout}, micro-batch 1"]
    assert (measured["layout"], measured["processes"]) == (layout, 2)
    assert measured["tokens/s"] == pytest.approx(2 * measured["tokens/s of a process"])
    assert measured["memory"] > measured["planned memory"] / 2
    assert figures[f"0.6B, {layout}, profile"]["operators"] > 10
    assert layout in output.with_suffix(".html").read_text()
