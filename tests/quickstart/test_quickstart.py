"""The quickstart runs everything; at full length it learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.frameworks import TORCH
from tandem.quickstart import run
from tandem.quickstart.run import QuickstartOptions, begin, quickstart
from tandem.quickstart.tasks import OPERATIONS, make_world
from tandem.training.run_record import read_starts


def test_every_stage_runs_on_both_backends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch", "mindspore"):
        require_framework(name)
    options = QuickstartOptions(
        backend="both", work_dir=str(tmp_path / "run"), pretrain_iters=3, finetune_iters=4, questions=8
    )
    stages = quickstart(options)
    assert [(stage.name, stage.backend, len(stage.steps)) for stage in stages] == [
        ("before training", "mindspore", 0),
        ("pretrain", "mindspore", 3),
        ("fine-tune", "mindspore", 2),
        ("fine-tune", "torch", 2),
        ("exported", "torch", 0),
    ]
    assert [step["iteration"] for stage in stages[2:4] for step in stage.steps] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert "Held-out accuracy on 8 questions" in out


@pytest.mark.slow("kills")
@pytest.mark.parametrize("interrupted", ["preprocess", "train", "convert", "export", "save_curve"])
def test_the_same_command_goes_on(interrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are those of a quickstart that nobody interrupted, and nothing is trained twice."""
    require_framework("torch")
    monkeypatch.setattr(run, "installed_frameworks", lambda: [TORCH])  # and without --backend, it is taken
    options = QuickstartOptions(work_dir=str(tmp_path / "run"), pretrain_iters=2, finetune_iters=2, questions=2)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    real = getattr(run, interrupted)
    monkeypatch.setattr(run, interrupted, stop)
    with pytest.raises(KeyboardInterrupt):
        quickstart(options)
    if interrupted == "train":  # the second training

        def second(settings: Settings) -> object:
            return stop() if settings.data.is_instruction_dataset else real(settings)

        monkeypatch.setattr(run, interrupted, second)
        with pytest.raises(KeyboardInterrupt):
            quickstart(options)
    monkeypatch.setattr(run, interrupted, real)
    stages = quickstart(options)
    assert [(stage.name, [step["iteration"] for step in stage.steps]) for stage in stages] == [
        *(("before training", []), ("pretrain", [1, 2]), ("fine-tune", [1, 2]), ("exported", [])),
    ]
    assert len(read_starts(tmp_path / "run" / "finetuned")) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    require_framework("torch")
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        quickstart(QuickstartOptions(backend="torch", work_dir=str(tmp_path)))
    options = QuickstartOptions(backend="torch", work_dir=str(tmp_path / "run"))
    begin(tmp_path / "run", options, ["torch"])
    with pytest.raises(UserError, match=r"a quickstart with --questions 200: give the same") as error:
        quickstart(QuickstartOptions(backend="torch", work_dir=str(tmp_path / "run"), questions=3))
    assert "--questions" in error.value.flags


def test_a_framework_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tandem-llm\[mindspore\]'"):
        quickstart(QuickstartOptions(backend="both", work_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow("users")
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
