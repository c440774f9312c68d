"""Runs that are stopped, by a signal or by a kill, go on by themselves, and a damaged checkpoint costs one interval."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from runs import assert_same_weights, run
from tandem.__main__ import STOPPED
from tandem.checkpoints.folders import RELEASE, TRACKER
from tandem.checkpoints.native.source import NativeSource
from tandem.conversion.convert import convert
from tandem.conversion.options import ConvertOptions
from tandem.errors import RunStopped, UserError
from tandem.training.logs.log import StepRecord
from tandem.training.start.resume import agree_on_iteration
from workspace import Workspace


def at(iteration: int, number: signal.Signals) -> Callable[[StepRecord], None]:
    return lambda record: os.kill(os.getpid(), number) if record.iteration == iteration else None


@pytest.mark.parametrize(("number", "instructions"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_saves_and_the_same_command_goes_on(
    workspace: Workspace, framework: str, number: signal.Signals, instructions: bool, tmp_path: Path
) -> None:
    """What was trained is kept, and the whole run equals an unbroken one bit by bit."""
    common = {"instructions": instructions, "train_iters": 12}
    unbroken = run(workspace, framework, save=str(tmp_path / "a"), **common)
    with pytest.raises(RunStopped, match=f"stopped by {number.name} after iteration 6"):
        run(workspace, framework, at(5, number), save=str(tmp_path / "b"), finetune=True, **common)
    assert NativeSource(tmp_path / "b").iteration == 6
    rest = run(workspace, framework, save=str(tmp_path / "b"), finetune=True, **common)
    assert rest == unbroken[6:]
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert run(workspace, framework, save=str(tmp_path / "b"), **common) == []  # all done


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    workspace: Workspace, framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = run(workspace, framework, save=str(tmp_path), save_interval=5)
    for damage in ("model.safetensors", "index.json"):
        file = next((tmp_path / "iter_0000020").rglob(damage))
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes(9) if damage.startswith("model") else whole[:100])
        capsys.readouterr()
        assert run(workspace, framework, save=str(tmp_path), save_interval=5) == unbroken[15:]
        assert "iter" in (out := capsys.readouterr().out)
        assert "taking the" in out
        assert damage in out


def test_all_damaged_is_an_error(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, "torch", save=str(tmp_path), train_iters=1, lr_warmup_iters=0)
    next(tmp_path.rglob("index.json")).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run(workspace, "torch", save=str(tmp_path), train_iters=2, lr_warmup_iters=0)


def test_the_folder_of_another_run_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, "torch", save=str(tmp_path), train_iters=1, lr_warmup_iters=0)
    with pytest.raises(UserError, match=r"another run, with data_path .*text.* here it is .*chat"):
        run(workspace, "torch", save=str(tmp_path), train_iters=2, lr_warmup_iters=0, instructions=True)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("ckpt_format", ["native", "torch"])
def test_the_folder_of_a_conversion_is_refused(
    workspace: Workspace, tmp_path: Path, ckpt_format: Literal["native", "torch"], release: bool
) -> None:
    folder = tmp_path / "converted"
    convert(ConvertOptions(load_dir=str(workspace.hf), save_dir=str(folder), ckpt_format=ckpt_format))
    if release:  # as Megatron names what is published
        (folder / "iter_0000001").rename(folder / RELEASE)
        (folder / TRACKER).write_text(RELEASE)
    with pytest.raises(UserError, match="contains a converted checkpoint: choose another folder"):
        run(workspace, "torch", save=str(folder), train_iters=1, lr_warmup_iters=0)


def test_changed_settings_are_shown(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(workspace, "torch", save=str(tmp_path), train_iters=2, lr_warmup_iters=0)
    capsys.readouterr()
    run(workspace, "torch", save=str(tmp_path), train_iters=4, lr=1e-3, lr_warmup_iters=0)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("> setting"))
    assert lines[start].split() == [">", "setting", "was", "is"]
    assert [line.split()[1:] for line in lines[start + 1 : start + 3]] == [
        ["lr", "0.003", "0.001"],
        ["train_iters", "2", "4"],
    ]


def test_an_exit_code_of_its_own(workspace: Workspace, tmp_path: Path) -> None:
    words = ["--load", str(workspace.hf), "--data-path", f"{workspace.text}_text_document", "--seq-length", "32"]
    words += ["--train-iters", "100000", "--lr", "1e-3", "--log-interval", "1", "--eval-iters", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "tandem", "pretrain", *words, "--save", str(tmp_path), "--split", "100,0,0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if "iteration" in line and "lm loss" in line)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert "stopped by SIGTERM" in output
    assert (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_the_step_to_load_is_for_the_first_start(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, "torch", save=str(tmp_path / "a"), save_interval=2, train_iters=6)
    common = {"load": str(tmp_path / "a"), "ckpt_step": 4, "save": str(tmp_path / "b")}
    assert len(run(workspace, "torch", **common, exit_interval=6)) == 2
    assert NativeSource(tmp_path / "b").iteration == 6
    assert len(run(workspace, "torch", **common, exit_interval=7)) == 1
    with pytest.raises(UserError, match=r"To go back to an earlier one, give --load .*b --ckpt-step 2"):
        run(workspace, "torch", **{**common, "ckpt_step": 2})
    back = {**common, "load": str(tmp_path / "b"), "ckpt_step": 6}  # what the error says
    assert len(run(workspace, "torch", **back, exit_interval=7)) == 1
    with pytest.raises(UserError, match="is a Hugging Face folder, which has no iteration 2"):
        run(workspace, "torch", ckpt_step=2)


class Ranks:
    """A `Communicator` of two ranks, of which the other one holds these iterations, newest first."""

    def __init__(self, *others: int | None) -> None:
        self.others = list(others)

    def all_gather(self, value: list[object]) -> list[object]:
        iteration = self.others[0]
        if iteration is not None and isinstance(value[0], int) and value[0] < iteration:
            self.others.pop(0)  # the other rank steps back
        return [value, [iteration, True]]


def test_machines_with_different_newest_iterations_take_the_newest_common_one(
    workspace: Workspace, tmp_path: Path
) -> None:
    run(workspace, "torch", save=str(tmp_path), save_interval=2, train_iters=6)
    newest = NativeSource(tmp_path)
    for others, taken in (((6,), 6), ((4,), 4), ((8, 6), 6), ((8, 5, 4, 2), 4)):
        agreed = agree_on_iteration(newest, Ranks(*others))  # type: ignore[arg-type]
        assert isinstance(agreed, NativeSource)
        assert agreed.iteration == taken
    with pytest.raises(UserError, match="ranks 1 have no checkpoint of the run"):
        agree_on_iteration(newest, Ranks(None))  # type: ignore[arg-type]


def test_a_checkpoints_schedule_is_kept_when_that_is_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    """Megatron's --use-checkpoint-opt_param-scheduler: the run decays as it began to, over the length of then."""
    folder, rates = str(tmp_path), list[float]()
    run(workspace, "torch", lambda step: rates.append(step.lr), save=folder, train_iters=6, exit_interval=3)
    changed = {"save": folder, "lr": 1.0, "weight_decay": 0.5, "train_iters": 8}
    run(workspace, "torch", lambda step: rates.append(step.lr), use_checkpoint_opt_param_scheduler=True, **changed)
    expected: list[float] = []
    run(workspace, "torch", lambda step: expected.append(step.lr), train_iters=8, lr_decay_iters=6)
    assert rates == expected
