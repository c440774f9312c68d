"""Steps that go wrong: stop or skip and count, what is left to look at, spikes, and going on after a resume."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runs import assert_same_weights, run
from tandem.backends.interface import Engine, StepResult
from tandem.config.settings import TrainingSettings
from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedWriter
from tandem.data.kinds import CONVERSATIONS
from tandem.errors import UserError
from tandem.report.page import render
from tandem.report.run_folder import read_runs
from tandem.training import run as run_module
from tandem.training.guard import SHORTEST, WINDOW, Guard
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import read_metrics
from workspace import Workspace

SHORT = {"train_iters": 8, "lr_warmup_iters": 2}


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Updates applied -> how many of the steps that follow have a loss that is not a number, once."""
    pending: dict[int, int] = {}
    create = run_module.create_engine

    def create_broken(*args: object) -> Engine:
        engine = create(*args)  # type: ignore[arg-type]
        train_step = engine.train_step

        def step(*args: object) -> StepResult:
            if pending.get(engine.optimizer_step):
                pending[engine.optimizer_step] -= 1
                return StepResult(math.nan, 1.0, 10, applied=False)
            return train_step(*args)  # type: ignore[arg-type]

        engine.train_step = step  # type: ignore[method-assign, assignment]
        return engine

    monkeypatch.setattr(run_module, "create_engine", create_broken)
    return pending


def test_a_step_with_nothing_to_train_names_its_samples(framework: str, workspace: Workspace, tmp_path: Path) -> None:
    with IndexedWriter(CONVERSATIONS.pair(tmp_path / "x", "input_ids"), np.int32) as ids:
        ids.add_document(np.arange(9))
    with IndexedWriter(CONVERSATIONS.pair(tmp_path / "x", "attention_mask"), np.int32) as mask:
        mask.add_document(np.ones(9))
    with IndexedWriter(CONVERSATIONS.pair(tmp_path / "x", "labels"), np.int32) as labels:
        labels.add_document(np.full(9, IGNORE))
    values = {"instructions": True, "data_path": str(tmp_path / "x"), "save": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"iteration 1: none of the 4 samples has a trained token.*x: sequences 0"):
        run(workspace, framework, **values)


def overflowing(workspace: Workspace, folder: Path, tensor: str) -> Path:
    """The toy with one tensor so large that products with it overflow."""
    shutil.copytree(workspace.hf, folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor] = np.full_like(weights[tensor], 3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("instructions", [False, True])
def test_numbers_that_are_not_finite_stop_the_run_and_leave_what_is_known(
    workspace: Workspace, framework: str, instructions: bool, tmp_path: Path
) -> None:
    """Injected in a layer: the message and the file name step, rank, samples and the first bad module."""
    hf = overflowing(workspace, tmp_path / "hf", "model.layers.1.mlp.down_proj.weight")
    values = {"load": str(hf), "save": str(tmp_path / "run"), "instructions": instructions}
    with pytest.raises(UserError, match=r"iteration 1: the loss is nan.*First bad: rank 0: output of decoder.layers.1"):
        run(workspace, framework, **values, **SHORT)
    details = json.loads((tmp_path / "run" / "bad_steps" / "iter_0000001_rank_00000.json").read_text())
    assert (details["iteration"], details["rank"], details["global_batch"]) == (1, 0, [0, 4])
    assert details["first_bad"].startswith("output of decoder.layers.1")
    assert list(details["samples"]) == ["0", "1", "2", "3"]
    assert all(re.search(r": sequences \d+", origin) for origin in details["samples"].values())
    assert not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()


def test_a_weight_that_is_not_finite_is_named(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(workspace.hf, hf)
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.1.self_attn.q_norm.weight"][3] = np.nan
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model tensor decoder.layers.1.self_attention.q_layernorm.weight"):
        run(workspace, framework, load=str(hf), **SHORT)


def test_skipped_steps_are_counted_and_the_schedule_waits(
    workspace: Workspace,
    framework: str,
    breaks: dict[int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in Megatron, the data go on and the learning rate does not."""
    plain: list[StepRecord] = []
    run(workspace, framework, plain.append, **SHORT)
    breaks[2] = 2
    records: list[StepRecord] = []
    capsys.readouterr()
    run(workspace, framework, records.append, save=str(tmp_path), on_bad_step="skip", log_interval=4, **SHORT)
    assert [record.skipped for record in records] == [False, False, True, True, False, False, False, False]
    assert [record.consumed_samples for record in records] == [4 * step for step in range(1, 9)]
    assert [r.lr for r in records] == [r.lr for r in plain[:3]] + [plain[2].lr] + [r.lr for r in plain[2:6]]
    out = capsys.readouterr().out
    assert "skipped iteration 3: the loss is nan. Nothing was updated. All tensors are finite" in out
    lines = re.findall(r"lm loss: (\S+) .*skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|", out)
    assert [line[1:] for line in lines] == [("0", "0"), ("2", "2"), ("0", "0")]
    assert float(lines[1][0]) == pytest.approx((records[0].loss + records[1].loss) / 2, rel=1e-6)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in metrics] == [record.skipped for record in records]
    assert metrics[2]["loss"] is None
    assert sorted(path.name[:12] for path in (tmp_path / "bad_steps").iterdir()) == ["iter_0000003", "iter_0000004"]
    assert "<html" in render(read_runs([str(tmp_path)]))


def test_too_many_skips_in_a_row_stop_the_run(workspace: Workspace, breaks: dict[int, int]) -> None:
    options = {"on_bad_step": "skip", "max_consecutive_skips": 2, **SHORT}
    breaks.update({1: 2, 2: 3})  # steps 2 and 3, then 5 to 7
    with pytest.raises(
        UserError, match=r"iteration 7: .*These 3 bad steps in a row are more than --max-consecutive-skips"
    ):
        run(workspace, "torch", **options)
    breaks.update({1: 2, 2: 3})
    assert len(run(workspace, "torch", no_check_for_nan_in_loss_and_grad=True, **SHORT)) == 8


@pytest.mark.parametrize("async_save", [False, True])
def test_what_was_saved_before_a_bad_step_is_kept(
    workspace: Workspace, framework: str, async_save: bool, breaks: dict[int, int], tmp_path: Path
) -> None:
    """After mending, the run goes on as if nothing had happened."""
    common = {"save_interval": 2, "async_save": async_save, **SHORT}
    unbroken = run(workspace, framework, save=str(tmp_path / "a"), **common)
    breaks[4] = 1
    with pytest.raises(UserError, match="iteration 5"):
        run(workspace, framework, save=str(tmp_path / "b"), **common)
    assert run(workspace, framework, save=str(tmp_path / "b"), **common) == unbroken[4:]
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_resuming_after_skips_is_exact(
    workspace: Workspace, framework: str, breaks: dict[int, int], tmp_path: Path
) -> None:
    """The schedule stands where it stood, and spikes are measured against the same losses."""
    common = {"on_bad_step": "skip", "check_for_spiky_loss": True, **SHORT}
    whole, parts = list[StepRecord](), list[StepRecord]()
    breaks.update({1: 1, 4: 1})
    run(workspace, framework, whole.append, save=str(tmp_path / "a"), **common)
    breaks.update({1: 1, 4: 1})
    run(workspace, framework, parts.append, save=str(tmp_path / "b"), exit_interval=4, **common)
    run(workspace, framework, parts.append, save=str(tmp_path / "b"), **common)
    assert [record.skipped for record in whole] == [False, True, False, False, False, True, False, False]
    for record, other in zip(whole, parts, strict=True):
        assert (record.skipped, record.lr, str(record.loss)) == (other.skipped, other.lr, str(other.loss))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    documents = [tmp_path / side / "iter_0000008" / "trainer_state.json" for side in "ab"]
    state, other_state = (json.loads(document.read_text()) for document in documents)
    assert state == other_state
    assert state["skipped_train_samples"] == 8
    assert state["recent_losses"] == [record.loss for record in whole if not record.skipped]


def test_spikes() -> None:
    guard = Guard(TrainingSettings(check_for_spiky_loss=True, spiky_loss_factor=1.5), [])
    for number in range(SHORTEST):
        assert guard.loss_limit == math.inf
        assert guard.judge(StepResult(2.0 + number % 2, 1.0, 10, applied=True)) is None
    assert guard.loss_limit == 1.5 * 2.5
    assert "a spike: above 3.7500" in (guard.judge(StepResult(4.0, 1.0, 10, applied=False)) or "")
    assert len(guard.recent_losses) == SHORTEST
    for _ in range(2 * WINDOW):
        guard.judge(StepResult(1.0, 1.0, 10, applied=True))
    assert guard.loss_limit == 1.5
    assert len(guard.recent_losses) == WINDOW
    off = Guard(TrainingSettings(), [1.0] * WINDOW)
    assert off.loss_limit == math.inf


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (StepResult(math.inf, 1.0, 5, False), "the loss is inf"),
        (StepResult(1.0, math.nan, 5, False), "the gradient norm is nan"),
        (StepResult(0.0, 0.0, 5, False), "the loss is 0.0, though tokens are trained"),
    ],
)
def test_what_is_wrong_is_said(result: StepResult, reason: str) -> None:
    guard = Guard(TrainingSettings(), [])
    assert guard.judge(result) == reason
    assert guard.skipped == 1
    assert guard.judge(dataclasses.replace(result, applied=True)) is None
    assert guard.skipped == 0


def test_a_spike_in_a_run_is_passed_over(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """Weights that jump make one: the engine refuses the step, whatever the backend."""
    records: list[StepRecord] = []
    run(
        workspace,
        framework,
        records.append,
        train_iters=20,
        check_for_spiky_loss=True,
        spiky_loss_factor=1.001,
        on_bad_step="skip",
        max_consecutive_skips=100,
        save=str(tmp_path),
        lr=1e-9,
        lr_warmup_iters=0,
    )
    means = []
    for record in records:
        applied = [earlier.loss for earlier in records[: record.iteration - 1] if not earlier.skipped]
        means.append(sum(applied) / len(applied) if len(applied) >= SHORTEST else math.inf)
    assert [record.skipped for record in records] == [r.loss > 1.001 * mean for r, mean in zip(records, means)]
    assert any(record.skipped for record in records)
