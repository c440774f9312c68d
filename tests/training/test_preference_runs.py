"""Runs on preferences: they start at ln 2, go on bit for bit, and find their reference again, whatever is gone."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import require_framework
from runs import assert_same_weights, run
from tandem.config.checks import check_settings
from tandem.data.batch import CHOSEN, IGNORE, MISMATCHED, REJECTED
from tandem.data.datasets.preferences import PairDataset, UnpairedDataset
from tandem.data.indexed import IndexedDataset
from tandem.errors import UserError
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.trainer import Trainer
from workspace import Workspace

DPO = {
    "instructions": True,
    "stage": "dpo",
    "seq_length": 96,
    "train_iters": 4,
    "lr_warmup_iters": 0,
    "lr": 1e-3,
}
LORA = {"lora_target_modules": "all-linear", "lora_r": 4}


def train(workspace: Workspace, pairs: Path, framework: str, **values: Any) -> Trainer:
    return run(workspace, framework, **{"data_path": str(pairs / "pairs-data"), **DPO, **values})


def copy_of(pairs: Path, tmp_path: Path) -> Path:
    """The data in a folder of their own, without the reference of other tests."""
    shutil.copytree(pairs, tmp_path / "data", ignore=shutil.ignore_patterns("*.npy"))
    return tmp_path / "data"


def metrics(folder: Path) -> list[dict[str, Any]]:
    times = ("time", "seconds", "tokens_per_second", "trained_tokens_per_second", "tflops_per_device", "memory")
    lines = read_metrics(folder / METRICS_FILE)
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def test_a_run_starts_at_ln_2_and_resumes_bit_for_bit(
    workspace: Workspace, pairs: Path, framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copy_of(pairs, tmp_path)
    evaluated = {"eval_interval": 2, "eval_iters": 1, "split": "80,20,0"}
    train(workspace, data, framework, save=str(tmp_path / "whole"), **evaluated)
    first, *_, last = whole = metrics(tmp_path / "whole")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["validation"]["validation"] < math.log(2)
    assert last["eval_rewards/margins"] > 0
    (file,) = data.glob("*.npy")
    out = capsys.readouterr().out
    assert "samples computed in" in out
    assert f"lm loss: {first['loss']:.6E} | rewards/accuracies: {first['rewards/accuracies']:.6E} |" in out

    written = file.stat().st_mtime_ns
    train(workspace, data, framework, save=str(tmp_path / "run"), exit_interval=2, **evaluated)
    out = capsys.readouterr().out
    assert f"samples from {file}" in out  # another run takes what the first one computed
    assert "samples computed in" not in out
    assert file.stat().st_mtime_ns == written
    file.unlink()  # the run finds the weights that it began with, and computes what it still needs
    train(workspace, data, framework, save=str(tmp_path / "run"), **evaluated)
    assert file.exists()
    assert file.stat().st_mtime_ns != written
    assert metrics(tmp_path / "run") == whole
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_adapters_are_compared_with_the_weights_below_them(
    workspace: Workspace, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    framework = require_framework("torch")
    data = copy_of(pairs, tmp_path)
    train(workspace, data, framework, save=str(tmp_path / "whole"), **LORA)
    (file,) = data.glob("*.npy")
    before = np.load(file)
    train(workspace, data, framework, save=str(tmp_path / "run"), exit_interval=2, **LORA)
    file.unlink()
    monkeypatch.setattr("tandem.training.start.reference.open_weights", None)  # adapters off, nothing is read again
    train(workspace, data, framework, save=str(tmp_path / "run"), **LORA)
    after = np.load(file)
    computed = ~np.isnan(after)
    assert computed.any()
    np.testing.assert_array_equal(after[computed], before[computed])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_reference_of_ones_own(workspace: Workspace, pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    data = copy_of(pairs, tmp_path)
    train(workspace, data, "torch", save=str(tmp_path / "first"), lr=1e-2)
    train(workspace, data, "torch", save=str(tmp_path / "run"), exit_interval=2, ref_model=str(tmp_path / "first"))
    loss = metrics(tmp_path / "run")[0]["loss"]
    assert loss > math.log(2) + 0.1  # the reference prefers the chosen answers, and the policy does not yet
    with pytest.raises(UserError, match=r"--ref-model .*compared with other weights"):
        train(workspace, data, "torch", save=str(tmp_path / "run"), ref_model=str(workspace.hf))
    train(workspace, data, "torch", save=str(tmp_path / "run"), ref_model=str(tmp_path / "first"))


@pytest.mark.parametrize(("framework_of_stage", "stage"), [("torch", "orpo"), ("mindspore", "simpo"), ("torch", "kto")])
def test_other_stages_train(
    workspace: Workspace, pairs: Path, framework_of_stage: str, stage: str, tmp_path: Path
) -> None:
    framework = require_framework(framework_of_stage)
    data = copy_of(pairs, tmp_path)
    path = data / ("answers-data" if stage == "kto" else "pairs-data")
    train(workspace, data, framework, data_path=str(path), stage=stage, save=str(tmp_path / "run"), train_iters=2)
    first = metrics(tmp_path / "run")[0]
    assert list(data.glob("*.npy")) == [] or stage == "kto"  # only KTO has a reference
    assert ("kl" in first) == (stage == "kto")
    if stage == "kto":
        assert first["loss"] == pytest.approx(0.5, abs=1e-4)  # 1 - sigmoid(0)


@pytest.mark.parametrize(("framework_of_stage", "stage"), [("torch", "dpo"), ("mindspore", "kto")])
def test_the_split_into_micro_batches_changes_nothing(
    workspace: Workspace, pairs: Path, framework_of_stage: str, stage: str, tmp_path: Path
) -> None:
    framework = require_framework(framework_of_stage)
    name = "answers-data" if stage == "kto" else "pairs-data"
    found = []
    for size in (1, 4):
        folder = tmp_path / str(size)
        train(
            workspace,
            pairs,
            framework,
            data_path=str(pairs / name),
            stage=stage,
            save=str(folder),
            micro_batch_size=size,
            train_iters=3,
        )
        found.append([(line["loss"], line["grad_norm"], line["logps/rejected"]) for line in metrics(folder)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


LAYOUTS = {
    "tp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pp": ["--pipeline-model-parallel-size", "2"],
    "dp": ["--use-distributed-optimizer"],
}
OF_TORCH = {"fsdp": ["--use-torch-fsdp2"]}


@pytest.mark.slow("layouts")
@pytest.mark.parametrize("layout", [*LAYOUTS, *OF_TORCH])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_layout_changes_nothing(
    workspace: Workspace, pairs: Path, framework: str, stage: str, layout: str, tmp_path: Path
) -> None:
    if layout in OF_TORCH and framework != "torch":
        pytest.skip("PyTorch's alone")
    compare_with_one_process(workspace, pairs, framework, stage, (LAYOUTS | OF_TORCH)[layout], workspace.hf, tmp_path)


@pytest.mark.slow("layouts")
@pytest.mark.parametrize("stage", ["dpo", "simpo"])
def test_shared_experts_change_nothing(
    workspace: Workspace, pairs: Path, small_mixture: Path, framework: str, stage: str, tmp_path: Path
) -> None:
    layout = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer", "--moe-aux-loss-coeff", "0.01"]
    compare_with_one_process(workspace, pairs, framework, stage, layout, small_mixture, tmp_path)


def compare_with_one_process(
    workspace: Workspace, pairs: Path, framework: str, stage: str, layout: list[str], model: Path, tmp_path: Path
) -> None:
    """Adapters of two processes have the losses, norms and log-probabilities of one."""
    data = copy_of(pairs, tmp_path)
    path = str(data / ("answers-data" if stage == "kto" else "pairs-data"))
    values = {"data_path": path, "stage": stage, "micro_batch_size": 1, "train_iters": 3, "load": str(model), **LORA}
    if "--moe-aux-loss-coeff" in layout:
        values["moe_aux_loss_coeff"] = float(layout[-1])
    train(workspace, data, framework, save=str(tmp_path / "one"), **values)
    for file in data.glob("*.npy"):
        file.unlink()  # each layout computes its own
    settings = workspace.settings(framework, **{**DPO, **values, "save": str(tmp_path / "two")})
    words = [
        *("--stage", stage, "--load", str(model), "--data-path", path, "--save", str(tmp_path / "two")),
        *("--seq-length", "96", "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "3"),
        *("--lr", "1e-3", "--lr-decay-style", settings.optimizer.lr_decay_style, "--split", "100,0,0"),
        *("--eval-iters", "0", "--lora-target-modules", "all-linear", "--lora-r", "4", "--nproc-per-node", "2"),
        *("--ai-framework", framework, *layout),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tandem", "finetune", *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["loss", "grad_norm", "logps/chosen", "logps/rejected"]
    names += ["rewards/margins"] if stage != "simpo" else []
    one, two = ([[line[name] for name in names] for line in metrics(tmp_path / run)] for run in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)


# --- samples


def test_a_sample_has_both_answers_side_by_side(pairs: Path) -> None:
    prefix = pairs / "pairs-data"
    sample = PairDataset(prefix, "train", "100,0,0", None, 96, 1, shuffle=False)[3]
    assert sample.answers is not None
    assert sample.answers.roles.tolist() == [CHOSEN, REJECTED]
    start = 0
    for name, length in zip(("chosen", "rejected"), sample.lengths):
        ids, labels = (
            IndexedDataset(f"{prefix}_packed_{name}_{key}_document")[3][:length] for key in ("input_ids", "labels")
        )
        part = slice(start, start + length)
        np.testing.assert_array_equal(sample.tokens[part], ids)
        np.testing.assert_array_equal(sample.labels[part], [*labels[1:], IGNORE])
        np.testing.assert_array_equal(sample.position_ids[part], np.arange(length))
        start += length
    assert start == len(sample.tokens)


def test_kto_compares_with_the_answer_before(pairs: Path) -> None:
    data = UnpairedDataset(pairs / "answers-data", "train", "100,0,0", None, 96, 1, shuffle=False)
    for number in (0, 5):
        sample, before = data[number], data[(number or 24) - 1]
        assert sample.answers is not None
        assert sample.answers.roles.tolist() == [CHOSEN if number % 3 else REJECTED, MISMATCHED]
        own, other = np.split(sample.labels, [sample.lengths[0]])
        prompt = np.flatnonzero(own != IGNORE)[0]
        np.testing.assert_array_equal(np.flatnonzero(other != IGNORE)[0], prompt)
        answer = before.labels[: before.lengths[0]]
        np.testing.assert_array_equal(other[other != IGNORE], answer[answer != IGNORE])


def test_both_answers_are_cut_to_the_same_length(pairs: Path) -> None:
    whole = PairDataset(pairs / "pairs-data", "train", "100,0,0", None, 96, 1, shuffle=False)[0]
    short = PairDataset(pairs / "pairs-data", "train", "100,0,0", None, 12, 1, shuffle=False)[0]
    assert max(whole.lengths) > 12
    assert max(short.lengths) <= 12
    parts = np.split(short.labels, [short.lengths[0]])
    kept = [np.count_nonzero(part != IGNORE) for part in parts]
    answers = [np.count_nonzero(part != IGNORE) for part in np.split(whole.labels, [whole.lengths[0]])]
    limit = max(kept)
    assert kept == [min(limit, answer) for answer in answers]
    assert min(kept) > 0


def test_pairs_that_are_cut_are_counted(
    workspace: Workspace, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    train(workspace, copy_of(pairs, tmp_path), "torch", seq_length=12, train_iters=1)
    assert "24 of 24 preferences are longer than --seq-length 12" in capsys.readouterr().out


# --- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dpo_beta": 0.3, "stage": "sft"}, r"--dpo-beta 0.3: is for --stage dpo, and this is --stage sft"),
        ({"kto_beta": 0.3, "stage": "dpo"}, r"--kto-beta 0.3: is for --stage kto"),
        ({"desirable_weight": 0, "undesirable_weight": 0, "stage": "kto"}, "nothing would be trained"),
        ({"ref_model": "x", "stage": "orpo"}, r"--ref-model x: is for --stage dpo or kto"),
        ({"dpo_label_smoothing": 0.1, "dpo_loss_type": "ipo", "stage": "dpo"}, "ipo does not use it"),
        ({"dpo_label_smoothing": 0.5, "dpo_loss_type": "robust", "stage": "dpo"}, "expected less than 0.5"),
        ({"is_pairwise_dataset": True}, "--is-pairwise-dataset needs --stage dpo, orpo, simpo"),
        ({"stage": "dpo", "lora_target_modules": "all-linear", "lora_dropout": 0.1}, "without dropout"),
        ({"stage": "dpo", "dpo_beta": 0.0}, "--dpo-beta 0.0: expected a positive number"),
    ],
)
def test_what_contradicts_is_refused(workspace: Workspace, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(workspace.settings("torch", instructions=True, **values))


def test_data_of_another_kind_are_refused(workspace: Workspace, pairs: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="these data are preferences, for `tandem finetune --stage dpo`"):
        run(workspace, "torch", instructions=True, data_path=str(pairs / "pairs-data"))
    with pytest.raises(UserError, match="these data are unpaired preferences, for `tandem finetune --stage kto`"):
        train(workspace, pairs, "torch", data_path=str(pairs / "answers-data"))


def test_a_reference_of_another_shape_is_refused(workspace: Workspace, pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    other = shutil.copytree(workspace.hf, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"--ref-model .*same shape"):
        train(workspace, pairs, "torch", ref_model=str(other))
