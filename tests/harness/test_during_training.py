"""`--eval-tasks`: benchmarks while a run trains, which change nothing in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.__main__ import main
from tandem.report.run_folder import read_runs
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.run import train
from workspace import Workspace


def test_a_run_with_benchmarks_ends_with_the_same_bits(
    workspace: Workspace, task_folder: Path, framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"train_iters": 3, "lr_warmup_iters": 1, "instructions": True, "save_interval": 3}
    asked = {
        "eval_tasks": ["toy_choices", "toy_answers"],
        "eval_tasks_interval": 2,
        "include_path": str(task_folder),
        "limit": 3,
        "num_fewshot": 1,
        "apply_chat_template": True,
    }
    np.random.seed(3)
    plain = train(workspace.settings(framework, save=str(tmp_path / "plain"), **values))
    drawn = np.random.random()
    np.random.seed(3)
    asking = train(workspace.settings(framework, save=str(tmp_path / "asking"), **values, **asked))
    assert np.random.random() == drawn
    for (kind, shard, one), (_, _, other) in zip(plain.engine.tensors(), asking.engine.tensors(), strict=True):
        assert one.tobytes() == other.tobytes(), (kind, shard.spec.name)

    steps = read_metrics(tmp_path / "asking" / METRICS_FILE)
    both = ["toy_answers", "toy_choices"]
    assert [sorted(step["tasks"]) for step in steps] == [[], both, both]
    assert steps[-1]["tasks"]["toy_choices"].keys() == {"acc", "acc_norm"}
    (run,) = read_runs([str(tmp_path / "asking")])
    assert [iteration for iteration, _ in run.task_points()["toy_choices acc"]] == [2, 3]
    assert " task toy_choices at iteration 2 | acc: " in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "asking"), "--output", str(page)]) == 0
    assert "toy_choices acc_norm" in page.read_text()

    # and the last values are those that `tandem evaluate` finds in the checkpoint
    words = ["evaluate", str(tmp_path / "asking"), "--tasks", *both, "--limit", "3", "--num-fewshot", "1"]
    words += ["--apply-chat-template", "--include-path", str(task_folder), "--ai-framework", framework]
    assert main([*words, "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    for name, metrics in steps[-1]["tasks"].items():
        for metric, value in metrics.items():
            key = metric if "," in metric else f"{metric},none"
            assert found[name][key] == pytest.approx(value, abs=1e-6), (name, metric)


def test_what_is_wrong_is_said_before_the_first_step(
    workspace: Workspace, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    words = ["finetune", "--load", str(workspace.hf), "--data-path", str(workspace.instructions), "--train-iters", "2"]
    words += ["--lr", "1e-3", "--seq-length", "32", "--save", str(tmp_path), "--include-path", str(task_folder)]
    words += ["--ai-framework", "torch"]
    assert main([*words, "--tasks", "toys"]) == 2
    assert "--tasks: belongs to `tandem evaluate`; --eval-tasks are asked" in capsys.readouterr().err
    for more in ([], ["--dry-run"]):
        assert main([*words, "--eval-tasks", str(tmp_path / "none.yaml"), *more]) == 2
        assert "none.yaml: no such file" in capsys.readouterr().err
    assert not list(tmp_path.glob("iter_*"))
