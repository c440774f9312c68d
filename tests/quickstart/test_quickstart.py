"""The quickstart runs everything; at full length it learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.errors import UserError
from tandem.quickstart.run import QuickstartOptions, quickstart
from tandem.quickstart.tasks import OPERATIONS, make_world


def test_every_stage_runs_on_both_backends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch", "mindspore"):
        require_framework(name)
    options = QuickstartOptions(
        backend="both", work_dir=str(tmp_path / "run"), pretrain_iters=3, finetune_iters=4, questions=8
    )
    stages = quickstart(options)
    assert [(stage.name, stage.backend, len(stage.records)) for stage in stages] == [
        ("before training", "mindspore", 0),
        ("pretrain", "mindspore", 3),
        ("fine-tune", "mindspore", 2),
        ("fine-tune", "torch", 2),
        ("exported", "torch", 0),
    ]
    assert [record.iteration for stage in stages[2:4] for record in stage.records] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert "Held-out accuracy on 8 questions" in out
    with pytest.raises(UserError, match="not empty"):
        quickstart(options)


@pytest.mark.slow("sizes")
def test_accuracy_rises_from_nothing(tmp_path: Path) -> None:
    for name in ("torch", "mindspore"):
        require_framework(name)
    stages = quickstart(QuickstartOptions(work_dir=str(tmp_path / "run")))
    assert stages[0].accuracy < 0.05
    assert stages[-1].accuracy > 0.85
    assert stages[-1].accuracy == stages[-2].accuracy  # exporting loses nothing


def test_held_out_lists_occur_nowhere_in_training() -> None:
    world = make_world(seed=3, lists=200, held_out_lists=20)
    lists = {item["output"] for item in world.held_out if item["instruction"].startswith("Repeat")}
    assert len(lists) == 20
    assert len(world.held_out) == 20 * len(OPERATIONS)
    asked = {word.strip(".?") for item in world.train for word in item["instruction"].split()}
    assert not lists & asked
    for text in world.text:
        described = {sentence.split(" is ")[0].split()[-1] for sentence in text.split(". ") if " is " in sentence}
        assert not lists & described


def test_answers_are_right() -> None:
    for item in make_world(seed=4, lists=50, held_out_lists=5).held_out:
        digits = "".join(character for character in item["instruction"] if character.isdigit())
        expected = {"Repeat": digits, "Reverse": digits[::-1], "Sort": "".join(sorted(digits)), "Which": max(digits)}
        assert item["output"] == expected[item["instruction"].split()[0]]
