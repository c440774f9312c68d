"""run.json, events.jsonl, and `tandem rerun`: the same settings give the same losses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest

from forking_launcher import launcher_for
from frameworks import require_framework
from runs import assert_same_weights
from tandem.__main__ import main
from tandem.cli.settings import parse_settings
from tandem.config.parsing import from_dict, to_yaml
from tandem.config.settings import Settings
from tandem.errors import RunStopped, UserError
from tandem.files.publish import write_text_atomically
from tandem.report.page import render
from tandem.report.run_folder import read_runs
from tandem.training.logs.events import read_events
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.rerun import RerunOptions, compare, rerun
from tandem.training.run import train
from tandem.training.run_record import RUN_FILE, read_starts
from workspace import Workspace


def short(workspace: Workspace, folder: Path, framework: str = "torch", **values: object) -> Settings:
    return workspace.settings(
        framework, **{"save": str(folder), "train_iters": 6, "lr_warmup_iters": 1, "save_interval": 2, **values}
    )


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / METRICS_FILE)]


def test_a_rerun_gives_the_same_losses(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    train(short(workspace, tmp_path / "a", framework))
    comparison = rerun(RerunOptions(str(tmp_path / "a"), save=str(tmp_path / "b"), deterministic_mode=True))
    assert (comparison.steps, comparison.difference) == (6, 0.0)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_resumed_run_is_run_again_whole(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second start is recorded next to the first, and only recorded steps are run again."""
    train(short(workspace, tmp_path, exit_interval=2))
    train(short(workspace, tmp_path, load=str(tmp_path), exit_interval=4))
    assert [start["iteration"] for start in read_starts(tmp_path)] == [0, 2]
    assert main(["rerun", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "resumed at iteration 2" in out
    assert "losses of 4 steps: identical" in out


def test_a_run_that_resumes_elsewhere_starts_from_the_same_iteration(workspace: Workspace, tmp_path: Path) -> None:
    """The folder it began from has newer checkpoints by now."""
    train(short(workspace, tmp_path / "a", exit_interval=2))
    train(short(workspace, tmp_path / "b", load=str(tmp_path / "a")))
    train(short(workspace, tmp_path / "a", load=str(tmp_path / "a")))
    assert rerun(RerunOptions(str(tmp_path / "b"))).steps == 4


def test_a_run_that_goes_on_with_adapters_is_run_again_and_reported(workspace: Workspace, tmp_path: Path) -> None:
    """Its adapters are those of another run, whose settings they bring along."""
    require_framework("torch")
    run = {"load": str(workspace.hf), "finetune": True, "train_iters": 2}
    train(short(workspace, tmp_path / "a", lora_target_modules="q_proj", lora_r=4, lora_use_rslora=True, **run))
    train(short(workspace, tmp_path / "b", lora_load=str(tmp_path / "a"), **run))
    train(
        short(workspace, tmp_path / "a", lora_target_modules="q_proj", **{**run, "finetune": False, "train_iters": 4})
    )
    comparison = rerun(RerunOptions(str(tmp_path / "b"), save=str(tmp_path / "c"), deterministic_mode=True))
    assert (comparison.steps, comparison.difference) == (2, 0.0)
    assert_same_weights(tmp_path / "b", tmp_path / "c")
    page = render(read_runs([str(tmp_path / name) for name in "abc"]))
    for part in ("<b>lora_load</b>", "<b>lora_target_modules</b>", "q_proj", str(workspace.hf), "a/iter_0000002"):
        assert part in page


@pytest.mark.slow("jobs")
def test_a_run_of_two_processes_is_run_again_by_two(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself; `--nproc-per-node` takes another number."""
    require_framework("torch")
    monkeypatch.setattr("tandem.cli.processes.launcher_of", launcher_for)
    settings = short(workspace, tmp_path / "a", tensor_model_parallel_size=2)
    (tmp_path / "run.yaml").write_text(to_yaml(settings))
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml"), "--nproc-per-node", "2"]) == 0
    assert main(["rerun", str(tmp_path / "a"), "--save", str(tmp_path / "b")]) == 0
    assert "losses of 6 steps: identical" in capsys.readouterr().out
    assert read_starts(tmp_path / "b")[0]["processes"] == 2
    assert main(["rerun", str(tmp_path / "a"), "--nproc-per-node", "1"]) == 2
    assert "1 processes" in capsys.readouterr().err


def test_a_record_says_what_the_run_was(workspace: Workspace, tmp_path: Path) -> None:
    settings = short(workspace, tmp_path)
    train(settings)
    (start,) = read_starts(tmp_path)
    assert from_dict(start["settings"], "run.json") == settings
    assert {"python", "tandem", "numpy", "torch"} <= start["versions"].keys()
    assert start["code"] is None or len(start["code"]["commit"]) == 40
    (record,) = start["data"].values()
    assert len(record["sources"][0]["sha256"]) == 64
    assert start["device"] == "cpu"
    assert start["model"]["parameters"] > 0


def test_events_outlive_a_resume(workspace: Workspace, tmp_path: Path) -> None:
    settings = short(workspace, tmp_path)

    def stop(record: StepRecord) -> None:
        if record.iteration == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(settings, stop)
    train(dataclasses.replace(settings, checkpoint=dataclasses.replace(settings.checkpoint, load=str(tmp_path))))
    events = [(event["event"], event["iteration"]) for event in read_events(tmp_path)]
    assert events == [
        ("started", 0),
        ("saved", 2),
        ("stopped", 3),
        ("started", 2),
        ("saved", 4),
        ("saved", 6),
        ("finished", 6),
    ]
    assert read_events(tmp_path)[2]["reason"] == "RuntimeError: power cut"


def test_a_signal_is_an_event(workspace: Workspace, tmp_path: Path) -> None:
    def stop(record: StepRecord) -> None:
        if record.iteration == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunStopped):
        train(short(workspace, tmp_path), stop)
    last = read_events(tmp_path)[-1]
    assert (last["event"], last["iteration"]) == ("stopped", 4)  # ranks agree on it with the next step
    assert "SIGTERM" in last["reason"]


def test_changed_data_are_not_run_again(workspace: Workspace, tmp_path: Path) -> None:
    train(short(workspace, tmp_path))
    path = tmp_path / RUN_FILE
    content = json.loads(path.read_text())
    (record,) = content["starts"][0]["data"].values()
    record["sources"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the data were preprocessed again"):
        rerun(RerunOptions(str(tmp_path)))


def test_a_loss_that_is_off_is_named() -> None:
    with pytest.raises(UserError, match=r"iteration 2: the loss was 1\.0, is 1\.5"):
        compare({1: 2.0, 2: 1.0, 3: 1.0}, {1: 2.0, 2: 1.5}, 0.1)
    with pytest.raises(UserError, match="iteration 1"):
        compare({1: 2.0}, {1: float("nan")}, 0.1)
    assert compare({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.25}, 0.5).worst == 2


@pytest.mark.parametrize(("words", "named"), [([], "RUN is required"), (["/no/run"], "/no/run does not exist")])
def test_a_folder_without_a_run_is_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rerun", *words]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--deterministic-mode", "--deterministic", "--npu-deterministic"])
def test_deterministic_under_each_of_its_names(flag: str) -> None:
    assert parse_settings("pretrain", "", [flag])[0].training.deterministic_mode


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "tandem-run", "version": 1}', "cut"])
def test_a_damaged_record_does_not_keep_a_run_from_going_on(
    workspace: Workspace, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is moved away, and the record begins again. Half an event is cut off."""
    train(short(workspace, tmp_path, exit_interval=2))
    path, events = tmp_path / "run.json", tmp_path / "events.jsonl"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(UserError, match=r"run\.json"):
        read_starts(tmp_path)
    events.write_bytes(events.read_bytes()[:-9])
    capsys.readouterr()
    train(short(workspace, tmp_path, exit_interval=3))
    assert "The damaged file is now run.json.damaged" in capsys.readouterr().err
    assert [start["iteration"] for start in read_starts(tmp_path)] == [2]
    assert (tmp_path / "run.json.damaged").exists()
    named = [event["event"] for event in read_events(tmp_path)]
    assert named == ["started", "saved", "started", "saved", "finished"]


def test_a_report_names_and_leaves_out_what_is_damaged(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(short(workspace, tmp_path, exit_interval=2))
    with (tmp_path / "events.jsonl").open("a") as events:
        events.write('{"event": "sav{"event": "saved"}\n')
    write_text_atomically(tmp_path / "profile" / "steps_1_2.json", '{"first": 1')
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "events.jsonl:4: this line is damaged" in err
    assert "steps_1_2.json: this summary is damaged" in err
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_rerun_finds_relative_paths_from_anywhere(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder, and when the folder around the run was moved."""
    project = tmp_path / "project"
    shutil.copytree(workspace.root, project)
    monkeypatch.chdir(project)
    text = f"{workspace.text.name}_text_document"
    train(short(workspace, Path("run"), load="hf", data_path=text, train_iters=2))
    monkeypatch.chdir(tmp_path)
    assert rerun(RerunOptions("project/run")).difference == 0.0
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert rerun(RerunOptions("run")).difference == 0.0
    assert f"{project}, where the run was started, is gone" in capsys.readouterr().out
