"""Upstream's own evaluate scripts: each command line is taken, with the name of the program and the paths changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.cli import evaluate
from tandem.config.settings import Settings
from tandem.models.published import qwen3_config
from tandem.parallel.grid import Grid
from tandem.training.start.weights import check_model_flags

LINES = Path(__file__).with_name("upstream_evaluate_scripts.txt").read_text(encoding="utf-8").splitlines()
SCRIPTS = {line.split()[0]: line.split()[1:] for line in LINES if not line.startswith("#")}


def settings_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Settings, list[str]]:
    """What the command understands: the settings and notices that it would begin with."""
    taken: list[Any] = []

    def take(settings: Settings, notices: list[str]) -> int:
        taken.extend((settings, notices))
        return 0

    monkeypatch.setattr(evaluate, "run_tasks", take)
    monkeypatch.setattr(evaluate, "run_as_processes", lambda *_: None)
    assert evaluate.run(words) == 0
    settings, notices = taken
    return settings, notices


def test_how_many_there_are() -> None:
    assert len(SCRIPTS) == 8


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in SCRIPTS[name] if word != "evaluation.py"]
    settings, notices = settings_of(words, monkeypatch)
    given = settings.evaluation
    assert (given.task, given.task_data_path, given.max_new_tokens) == (("mmlu",), ("PATH_",), 2)
    assert not given.apply_chat_template
    assert settings.launch.nproc_per_node == 8
    size = name.split("qwen3_")[1].removesuffix("_ptd.sh").replace("point", ".").replace("_", "-").upper()
    config = qwen3_config(size)
    check_model_flags(settings.model, settings.experts, settings.data.seq_length, config)
    settings.parallel.layout.check(config)
    Grid(settings.parallel.layout, settings.launch.nproc_per_node * settings.launch.nnodes)
    assert len(notices) == 1
    assert "accepted, without effect here" in notices[0]


def test_a_template_is_applied_unless_a_flag_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As upstream does. Without --task nothing of this holds."""
    words = ["--load", "M", "--task", "gsm8k", "--task-data-path", "D", "--max-eval-samples", "5"]
    settings, _ = settings_of(words, monkeypatch)
    assert settings.evaluation.apply_chat_template
    assert settings.data.enable_thinking == "false"
    assert settings.evaluation.limit == 5
    more = ["--evaluation-batch-size", "4", "--eval-language", "zh", "--broadcast", "--greedy", "--origin-postprocess"]
    settings, notices = settings_of([*words, *more, "--alternative-prompt", "--no-chat-template"], monkeypatch)
    assert not settings.evaluation.apply_chat_template
    assert "--evaluation-batch-size --eval-language --broadcast" in notices[0]
    settings, _ = settings_of(["--load", "M", "--tasks", "gsm8k"], monkeypatch)
    assert not settings.evaluation.apply_chat_template
    assert settings.data.enable_thinking is None
