"""`benchmarks/device.py`: what a stage found stays, whatever ends it, and the next stage runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frameworks import require_framework

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

FAULTY = """
import sys, time
sys.path.insert(0, {benchmarks!r})
import device, device_stages
from device_stages import Stage

def hangs(run):
    run.note({{"found": 1.5}})
    time.sleep(60)

def fails(run):
    run.note({{"found": [1, 2]}})
    raise RuntimeError("out of memory")

device_stages.STAGES = (
    Stage("hangs", 3, hangs), Stage("fails", 30, fails), Stage("works", 30, lambda run: run.note({{"on": run.device}})),
)
device.SHORTEST = 2.5
device.main()
"""


def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        values = json.loads(line)
        by_stage.setdefault(values.pop("stage"), []).append(values)
    return by_stage


def test_results_stay_whatever_ends_a_stage(tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(benchmarks=str(BENCHMARKS)))
    folder = tmp_path / "out"
    command = [sys.executable, str(script), str(folder), "--device", "cpu", "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = results(folder)
    assert found["hangs"][0] == {"found": 1.5}
    assert found["hangs"][1]["ended"] == "stopped after 3 s"
    assert found["fails"][0] == {"found": [1, 2]}
    assert found["fails"][1]["ended"] == "ended with code 1"
    assert found["fails"][1]["output"].rstrip().endswith("RuntimeError: out of memory")
    assert [found["works"][0], found["works"][1]["ended"]] == [{"on": "cpu"}, "done"]
    assert "- found: 1 2" in (folder / "summary.md").read_text()
    command[-1] = "5"  # seconds for all: the first stage takes most of them
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert results(folder)["works"][-1] == {"ended": "not begun: the time was over"}


@pytest.mark.slow("users")
def test_a_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    """Stages without what takes long to compile, on models of no size."""
    require_framework("torch")
    require_framework("transformers")
    names = ["machine", "toys", "bits", "transformers", "large", "whole-8b", "parts", "packed", "trace"]
    command = [sys.executable, str(BENCHMARKS / "device.py"), str(tmp_path), "--device", "cpu", "--tiny", "--stages"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=False, env=environment)
    found = results(tmp_path)
    assert [stage for stage in names if found[stage][-1]["ended"] != "done"] == [], done.stdout
    assert found["toys"][0]["the same in fp32"] is True
    assert found["bits"][0] == {"two deterministic runs have the same bits": True}
    assert found["transformers"][0]["loss difference"] < 1e-5
    assert found["transformers"][0]["gradient difference"] < 1e-4
    ours, theirs = found["packed"][:2]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)  # the peer computes in bf16
    assert len(found["parts"]) == 2 * 7 + 1
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000
