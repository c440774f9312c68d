"""`tandem evaluate --tasks` on several processes finds what it finds on one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tandem
from frameworks import require_framework
from tandem.models.experts import Experts
from tandem.models.hf_config import from_hf, to_hf
from workspace import Workspace

LAYOUTS = ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", ""]


def samples_of(model: Path, task_folder: Path, output: Path, framework: str, *words: str) -> list[Any]:
    """What was answered to each question, from a command in a process of its own."""
    tasks = ["--tasks", "toy_choices", "toy_answers", "--include-path", str(task_folder), "--tokens-per-batch", "64"]
    files = ["--output", str(output), "--log-samples", "--ai-framework", framework]
    command = [sys.executable, "-m", "tandem", "evaluate", str(model), *tasks, *files, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "toy_choices" in done.stdout
    lines = [line for path in sorted(output.parent.glob(f"{output.stem}_samples_*")) for line in path.open()]
    return [json.loads(line)["resps"] for line in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow("answers")
def test_two_processes_answer_as_one(
    workspace: Workspace, task_folder: Path, framework: str, tmp_path: Path, layout: str
) -> None:
    check(workspace.hf, task_folder, framework, tmp_path, ["--nproc-per-node", "2", *layout.split()])


@pytest.mark.parametrize(("framework", "processes"), [("torch", "2"), ("torch", "4"), ("mindspore", "2")])
@pytest.mark.slow("answers")
def test_ranks_that_share_experts_answer_as_one(
    workspace: Workspace, task_folder: Path, tmp_path: Path, framework: str, processes: str
) -> None:
    """One copy of the model, and two."""
    require_framework(framework)
    shutil.copytree(workspace.hf, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors*", "tandem.json"))
    config = from_hf(json.loads((tmp_path / "config/config.json").read_text()), "test")
    experts = Experts(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16, norm_topk_prob=True)
    moe = dataclasses.replace(config, model_type="qwen3_moe", experts=experts)
    (tmp_path / "config/config.json").write_text(json.dumps(to_hf(moe, dtype="float32")))
    model = tmp_path / "model"
    tandem.convert(tmp_path / "config", model, load_model_type="random", save_model_type="hf", no_verify=True)
    words = ["--nproc-per-node", processes, "--expert-model-parallel-size", "2"]
    check(model, task_folder, framework, tmp_path, words)


def check(model: Path, task_folder: Path, framework: str, folder: Path, words: list[str]) -> None:
    alone = samples_of(model, task_folder, folder / "one.json", framework)
    together = samples_of(model, task_folder, folder / "more.json", framework, *words)
    assert len(alone) == len(together) == 12
    for one, two in zip(alone, together):
        assert flat(two) == [pytest.approx(x, abs=1e-4) if isinstance(x, float) else x for x in flat(one)]


def flat(values: Any) -> list[Any]:
    return [inner for value in values for inner in flat(value)] if isinstance(values, list) else [values]
