"""The console of a run: its first and last loss, what `--split` holds out, and a summary at the end."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from steps import step_record
from tandem.errors import RunStopped
from tandem.training.logs.log import IterationLog
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.logs.summary import RunSummary
from tandem.training.run import train
from workspace import Workspace


def printed_steps(text: str) -> list[int]:
    return [int(number) for number in re.findall(r" iteration +(\d+)/", text)]


def test_the_first_and_the_last_step_are_printed_whatever_the_interval(
    workspace: Workspace, framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"train_iters": 7, "log_interval": 3, "save": str(tmp_path / "run")}
    train(workspace.settings(framework, **values))
    out = capsys.readouterr().out
    assert printed_steps(out) == [1, 3, 6, 7]
    summary = out[out.index("> 7 steps in") :]
    losses = [step["loss"] for step in read_metrics(tmp_path / "run" / METRICS_FILE)]
    assert f"loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step 7" in summary
    assert "peak memory" in summary
    assert f"saved in {tmp_path / 'run'}; next: tandem export" in summary


def test_a_mean_is_over_the_whole_interval_although_its_first_step_has_a_line() -> None:
    lines: list[str] = []
    log = IterationLog(4, log_throughput=False, write=lines.append)
    for iteration, loss in enumerate((8.0, 4.0, 2.0, 2.0, 7.0, 5.0), start=1):
        log.step(step_record(iteration, loss=loss), is_last=iteration == 6)
    means = [float(re.search(r"lm loss: (\S+)", line)[1]) for line in lines]  # type: ignore[index]
    assert means == [8.0, 4.0, 6.0]


def test_a_run_that_leaves_early_says_how_to_go_on(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(workspace.settings("torch", train_iters=9, log_interval=100, exit_interval=4, save=str(tmp_path)))
    out = capsys.readouterr().out
    assert printed_steps(out) == [1, 4]
    assert "the same command trains the other 5 steps" in out


def test_a_stopped_run_has_a_summary_too(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(record: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped):
        train(workspace.settings("torch", instructions=True, save=str(tmp_path)), stop)
    assert "the same command trains the other" in capsys.readouterr().out


def test_summaries_of_unusual_runs() -> None:
    def lines(*records: object, folder: Path | None = None, answers: bool = False) -> str:
        summary = RunSummary(folder, answers)
        for record in records:
            summary.step(record)  # type: ignore[arg-type]
        return "\n".join(summary.lines())

    assert lines() == ""
    assert "nothing was saved: --save" in lines(step_record(1))
    skipped = lines(step_record(1, skipped=True, loss=float("nan")))
    assert "1 of them skipped" in skipped
    assert "no step was applied" in skipped
    last = step_record(100, train_iters=100, validation={"code": 2.5})
    assert "code loss 2.5000" in lines(step_record(99), last)
    assert "tandem generate 'my run'" in lines(last, folder=Path("my run"), answers=True)


def test_what_split_holds_out_is_said(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"train_iters": 3, "lr_warmup_iters": 0, "eval_iters": 1, "eval_interval": 2}
    train(workspace.settings("torch", **values, split="90,8,2"))
    out = capsys.readouterr().out
    assert re.search(r"--split 90,8,2 trains 27 of 30 sequences and holds out 2 for validation and 1 for test", out)
    assert re.findall(r"validation loss at iteration (\d+)", out) == ["2", "3"]  # the last step always
    train(workspace.settings("torch", **values, split="100,0,0"))
    out = capsys.readouterr().out
    assert "holds out nothing for validation: nothing is evaluated" in out
    assert "validation loss" not in out
    train(workspace.settings("torch", **{**values, "eval_interval": 4}, split="90,10,0"))
    out = capsys.readouterr().out
    assert "an evaluation is due every 4 steps, and the run has 3" in out
    assert "validation loss" not in out
