"""`tandem bench`: stages in processes of their own, one JSON file and one page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from frameworks import require_framework
from tandem.__main__ import main
from tandem.bench import run
from tandem.bench.options import BenchOptions
from tandem.bench.run import StageResult, bench
from tandem.errors import UserError


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(options: BenchOptions, name: str, shows: str) -> StageResult:
        if name == "clipping":
            return StageResult(name, shows, None, "RuntimeError: <no kernel>", 1.0)
        return StageResult(name, shows, {"tokens/s": 12345.6, "memory": 2**31}, "", 1.0)

    monkeypatch.setattr(run, "_run", result)
    output = tmp_path / "bench.json"
    results = bench(BenchOptions(output=str(output), sizes=("0.6B",), micro_batch_sizes=(1,)))
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
    result = run._run(BenchOptions(stage_seconds=1), "parity", "")
    assert result.figures is None
    assert result.error == "stopped after 1 s"


def test_a_process_that_dies_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    result = run._run(BenchOptions(), "parity", "")
    assert result.figures is None
    assert result.error == "ended with code 9: out of memory"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--output", "bench.txt"], "--output bench.txt"),
        (["--documents", "9", "--seq-length", "8"], "--documents 9"),
        (["--sizes", "5B"], "5B"),
    ],
)
def test_wrong_options_are_refused(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert named in capsys.readouterr().err


def test_no_other_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("my own page")
    with pytest.raises(UserError, match=r"mine\.html"):
        bench(BenchOptions(output=str(tmp_path / "mine.json")))
    assert (tmp_path / "mine.html").read_text() == "my own page"


def test_kernels_copies_and_waits_are_counted() -> None:
    require_framework("torch")
    from torch.autograd import DeviceType

    from tandem.backends.torch.profiling import count

    def event(name: str, device: DeviceType = DeviceType.CPU, parent: SimpleNamespace | None = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, cpu_parent=parent)

    outer = event("aten::linear")
    events = [
        *(outer, event("aten::mm", parent=outer), event("_Linear"), event("aten::add")),
        *(event("cudaLaunchKernel"), event("cudaStreamSynchronize"), event("cudaDeviceSynchronize")),
        *(event("sm90_gemm", DeviceType.CUDA), event("triton_red_fused", DeviceType.CUDA)),
        *(event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA), event("Memset (Device)", DeviceType.CUDA)),
    ]
    assert count(events, on_device=True) == {"kernels": 2, "copies to the device": 1, "waits": 2}
    assert count(events, on_device=False) == {"operators": 2}  # linear and add


WITHOUT_PACKAGES = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import tandem.bench.worker
from tandem.__main__ import main
main(["bench", "--help"])
"""


def test_it_needs_the_framework_and_numpy_alone() -> None:
    absent = {"tokenizers", "orjson", "pyarrow", "jinja2", "yaml", "rich", "matplotlib", "transformers", "safetensors"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES.format(absent=absent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--micro-batch-sizes" in done.stdout


@pytest.mark.slow("jobs")
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
