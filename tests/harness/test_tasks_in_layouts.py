"""`tandem evaluate --tasks` on several processes finds what it finds on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workspace import Workspace

LAYOUTS = ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", ""]


def samples_of(workspace: Workspace, task_folder: Path, output: Path, framework: str, *words: str) -> list[Any]:
    """What was answered to each question, from a command in a process of its own."""
    tasks = ["--tasks", "toy_choices", "toy_answers", "--include-path", str(task_folder), "--tokens-per-batch", "64"]
    files = ["--output", str(output), "--log-samples", "--ai-framework", framework]
    command = [sys.executable, "-m", "tandem", "evaluate", str(workspace.hf), *tasks, *files, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "toy_choices" in done.stdout
    lines = [line for path in sorted(output.parent.glob(f"{output.stem}_samples_*")) for line in path.open()]
    return [json.loads(line)["resps"] for line in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow("jobs")
def test_two_processes_answer_as_one(
    workspace: Workspace, task_folder: Path, framework: str, tmp_path: Path, layout: str
) -> None:
    alone = samples_of(workspace, task_folder, tmp_path / "one.json", framework)
    words = ["--nproc-per-node", "2", *layout.split()]
    together = samples_of(workspace, task_folder, tmp_path / "two.json", framework, *words)
    assert len(alone) == len(together) == 12
    for one, two in zip(alone, together):
        assert flat(two) == [pytest.approx(x, abs=1e-4) if isinstance(x, float) else x for x in flat(one)]


def flat(values: Any) -> list[Any]:
    return [inner for value in values for inner in flat(value)] if isinstance(values, list) else [values]
