"""fp16 training: the dynamic loss scale moves as Megatron's does, and a run is resumed with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from frameworks import require_framework
from runs import assert_same_weights, run
from tandem.config.settings import TrainingSettings
from tandem.errors import UserError
from tandem.training.logs.log import StepRecord
from tandem.training.loss_scale import LossScale
from workspace import Workspace

FP16 = {"fp16": True, "train_iters": 12, "initial_loss_scale": 2.0**20, "loss_scale_window": 4, "hysteresis": 1}


def test_the_scale_falls_and_grows_as_megatrons() -> None:
    """`DynamicGradScaler`: after `hysteresis` overflows each one halves; the patience comes back with a growth."""
    settings = TrainingSettings(
        fp16=True, initial_loss_scale=8.0, loss_scale_window=3, hysteresis=2, min_loss_scale=2.0
    )
    scale = LossScale.of(settings, {})
    values = []
    for overflow in (True, True, True, False, False, False, True, True, True, True):
        scale.update(overflow=overflow)
        values.append(scale.value)
    assert values == [8, 4, 2, 2, 2, 4, 4, 2, 2, 2]
    assert not scale.may_fall
    again = LossScale.of(settings, scale.to_dict())
    assert again == scale


def test_a_constant_scale_stays() -> None:
    scale = LossScale.of(TrainingSettings(fp16=True, loss_scale=128.0), {})
    scale.update(overflow=True)
    assert (scale.value, scale.may_fall, scale.to_dict()) == (128.0, False, {})
    assert LossScale.of(TrainingSettings(), {"value": 4.0}).value == 1.0


Whole = Callable[[str], tuple[list[StepRecord], Path]]


@pytest.fixture(scope="module")
def unbroken(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """All steps of a framework, trained once, and where they are saved."""

    @functools.cache
    def train_whole(framework: str) -> tuple[list[StepRecord], Path]:
        folder, records = tmp_path_factory.mktemp("unbroken"), list[StepRecord]()
        run(workspace, framework, records.append, save=str(folder), **FP16)
        return records, folder

    return train_whole


def test_a_run_in_fp16_finds_its_scale_and_is_resumed_exactly(
    workspace: Workspace, framework: str, unbroken: Whole, tmp_path: Path
) -> None:
    whole, folder = unbroken(framework)
    parts, full = list[StepRecord](), list[StepRecord]()
    run(workspace, framework, parts.append, save=str(tmp_path / "b"), exit_interval=7, **FP16)
    run(workspace, framework, parts.append, save=str(tmp_path / "b"), **FP16)
    run(workspace, framework, full.append, train_iters=12, exit_interval=1)
    assert whole[0].skipped
    assert math.isfinite(whole[0].loss)
    assert whole[1].loss_scale == 2.0**19
    assert not whole[-1].skipped
    assert whole[0].loss == pytest.approx(full[0].loss, rel=1e-2)
    for one, other in zip(whole, parts, strict=True):
        assert (one.loss, one.lr, one.loss_scale, one.skipped) == (
            other.loss,
            other.lr,
            other.loss_scale,
            other.skipped,
        )
    assert_same_weights(folder, tmp_path / "b")


@pytest.mark.parametrize("road", [("torch", "mindspore"), ("mindspore", "torch")], ids="-".join)
def test_a_run_in_fp16_goes_on_on_the_other_backend(
    workspace: Workspace, road: tuple[str, str], unbroken: Whole, tmp_path: Path
) -> None:
    """Scales and skipped steps are those of the unbroken run, losses those to fp16's rounding."""
    whole, _ = unbroken(require_framework("torch"))
    parts = list[StepRecord]()
    run(workspace, require_framework(road[0]), parts.append, save=str(tmp_path), exit_interval=7, **FP16)
    run(workspace, require_framework(road[1]), parts.append, save=str(tmp_path), **FP16)
    assert [(one.loss_scale, one.skipped) for one in parts] == [(one.loss_scale, one.skipped) for one in whole]
    assert len({one.loss_scale for one in parts[7:]}) > 1
    assert [one.loss for one in parts] == pytest.approx([one.loss for one in whole], rel=1e-3)


def test_a_run_whose_steps_all_overflow_says_so(
    workspace: Workspace, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning that never began looks like one on the console, but for these words."""
    values = {**FP16, "train_iters": 2, "initial_loss_scale": 2.0**40, "lr_warmup_iters": 0}
    steps = list[StepRecord]()
    run(workspace, framework, steps.append, **values)
    assert [step.skipped for step in steps] == [True, True]
    said = capsys.readouterr().err
    assert said.count("all 2 steps were skipped") == 1
    assert "--initial-loss-scale" in said
    run(workspace, framework, **FP16)
    assert "skipped" not in capsys.readouterr().err


def test_fp16_and_bf16_exclude_each_other(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="--fp16 and --bf16 exclude each other"):
        run(workspace, "torch", fp16=True, bf16=True)
