"""`tandem evaluate` on pairs and single answers: as transformers computes it, and as a training evaluates itself."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tandem
from frameworks import require_framework
from runs import run
from tandem.__main__ import main
from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedDataset
from tandem.errors import UserError
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.objectives import Evaluation
from workspace import Workspace

DPO = {"instructions": True, "stage": "dpo", "seq_length": 96, "lr": 1e-3, "lr_warmup_iters": 0, "eval_iters": "full"}
SLOW_ONES = [("torch", "kto"), ("mindspore", "dpo"), ("mindspore", "kto")]
LORA = {"lora_target_modules": "all-linear", "lora_r": 4}


def data_of(pairs: Path, tmp_path: Path) -> Path:
    """The data in a folder of their own, without the references of other tests."""
    return shutil.copytree(pairs, tmp_path / "data", ignore=shutil.ignore_patterns("*.npy"))


def prefix_of(data: Path, stage: str) -> str:
    return str(data / ("answers-data" if stage == "kto" else "pairs-data"))


def evaluated(load: Path, prefix: str, framework: str, **values: Any) -> Evaluation:
    found = tandem.evaluate(load, prefix, ai_framework=framework, seq_length=96, **values)["validation"]
    assert isinstance(found, Evaluation)
    return found


@pytest.fixture(scope="module")
def other(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the workspace's, with other weights."""
    folder = shutil.copytree(workspace.hf, tmp_path_factory.mktemp("other") / "hf")
    (file,) = folder.glob("*.safetensors")
    tensors, draw = load_file(file), np.random.default_rng(3)
    for name, values in tensors.items():
        tensors[name] = (values + 0.02 * draw.standard_normal(values.shape)).astype(values.dtype)
    save_file(tensors, file, {"format": "pt"})
    return folder


def sums_of_transformers(folder: Path, prefix: str, name: str) -> np.ndarray:
    """The log-probability of each stored answer, float64 [answers]."""
    torch, transformers = (pytest.importorskip(module) for module in ("torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, labels = (IndexedDataset(f"{prefix}_packed_{name}_{key}_document") for key in ("input_ids", "labels"))
    sums = []
    for row in range(len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor(ids[row].astype(np.int64))[None]).logits[0, :-1]
        target = torch.tensor(labels[row][1:].astype(np.int64))
        counts = target != IGNORE
        sums.append(torch.log_softmax(logits[counts].double(), -1).gather(1, target[counts][:, None]).sum().item())
    return np.array(sums)


@pytest.mark.parametrize("of_framework", ["torch", pytest.param("mindspore", marks=pytest.mark.slow("answers"))])
def test_pairs_as_transformers_and_the_formula_of_dpo(
    workspace: Workspace, pairs: Path, other: Path, of_framework: str, tmp_path: Path
) -> None:
    framework = require_framework(of_framework)
    prefix = prefix_of(data_of(pairs, tmp_path), "dpo")
    found = evaluated(other, prefix, framework, ref_model=str(workspace.hf), dpo_beta=0.3, micro_batch_size=5)
    sums = {
        (folder, name): sums_of_transformers(folder, prefix, name)
        for folder in (other, workspace.hf)
        for name in ("chosen", "rejected")
    }
    rewards = [0.3 * (sums[other, name] - sums[workspace.hf, name]) for name in ("chosen", "rejected")]
    margins = rewards[0] - rewards[1]
    expected = {
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": sums[other, "chosen"].mean(),
        "logps/rejected": sums[other, "rejected"].mean(),
    }
    assert found.metrics == pytest.approx(expected, abs=1e-4)
    assert found.loss == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("of_framework", "stage"),
    [("torch", "dpo"), *(pytest.param(*one, marks=pytest.mark.slow("answers")) for one in SLOW_ONES)],
)
def test_evaluation_equals_that_in_training(
    workspace: Workspace, pairs: Path, other: Path, of_framework: str, stage: str, tmp_path: Path
) -> None:
    """Adapters: compared with the weights below them. Whole weights: with those that the run began with."""
    framework = require_framework(of_framework)
    data = data_of(pairs, tmp_path)
    prefix, folder = prefix_of(data, stage), tmp_path / "run"
    kind: dict[str, Any] = LORA if stage == "dpo" else {}
    values = {**DPO, **kind, "stage": stage, "data_path": prefix, "valid_data_path": [prefix], "train_iters": 2}
    run(workspace, framework, save=str(folder), **values)
    last = read_metrics(folder / METRICS_FILE)[-1]
    for file in data.glob("*.npy"):
        file.unlink()  # the reference is found from the checkpoint
    sizes = {"micro_batch_size": 2, "global_batch_size": 4}
    found = evaluated(folder, prefix, framework, **sizes)
    assert found.loss == last["validation"]["validation"]
    assert {f"eval_{name}": value for name, value in found.metrics.items()} == {
        name: value for name, value in last.items() if name.startswith("eval_")
    }
    if kind:
        separate = evaluated(workspace.hf, prefix, framework, lora_load=str(folder), **sizes)
        assert dataclasses.asdict(separate) == dataclasses.asdict(found)
    else:
        assert found.loss != pytest.approx(evaluated(folder, prefix, framework, ref_model=str(other)).loss, abs=1e-3)


def test_the_command_shows_a_column_for_each_set(
    workspace: Workspace, pairs: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    words = [
        f"one={prefix_of(pairs, 'dpo')}",
        f"single={prefix_of(pairs, 'kto')}",
        f"text={workspace.text}_text_document",
    ]
    more = ["--ai-framework", "torch", "--seq-length", "96", "--ref-model", str(workspace.hf), "--eval-iters", "1"]
    assert main(["evaluate", str(other), *words, *more]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"preferences\W+one\W+single", shown)
    assert re.search(r"rewards/accuracies\W+\d\.\d{6}", shown)
    assert re.search(r"\bkl\b", shown)
    assert re.search(r"text\W+\d+\.\d{6}\W+\d", shown)


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("dpo", {}, r"nothing says what it is compared with: give .*--ref-model FOLDER"),
        ("kto", {"stage": "dpo"}, r"answers-data: these data are unpaired preferences, and --stage dpo is for others"),
        ("dpo", {"stage": "sft"}, r"--stage sft is for others: give --stage dpo or orpo or simpo, or leave it out"),
        ("dpo", {"kto_beta": 0.3}, r"--kto-beta 0.3: is for --stage kto, and this is --stage dpo"),
        ("dpo", {"stage": "orpo", "ref_model": "x"}, r"--ref-model x: is for --stage dpo or kto"),
        ("dpo", {"ref_model": "nowhere"}, r"--ref-model: .*nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    workspace: Workspace, pairs: Path, stage: str, values: dict[str, Any], message: str
) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=message):
        evaluated(workspace.hf, prefix_of(pairs, stage), "torch", **values)


LAYOUTS = {
    "tp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pp": ["--pipeline-model-parallel-size", "2"],
    "dp": [],
    "fsdp": ["--use-torch-fsdp2"],
}


@pytest.mark.slow("layouts")
@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(
    workspace: Workspace, pairs: Path, other: Path, framework: str, layout: str, stage: str, tmp_path: Path
) -> None:
    if layout == "fsdp" and framework != "torch":
        pytest.skip("PyTorch's alone")
    require_framework(framework)
    prefix = prefix_of(data_of(pairs, tmp_path), stage)
    alone = evaluated(other, prefix, framework, ref_model=str(workspace.hf))
    for file in Path(prefix).parent.glob("*.npy"):
        file.unlink()  # the processes compute it together
    words = ["--ref-model", str(workspace.hf), "--seq-length", "96", "--nproc-per-node", "2", *LAYOUTS[layout]]
    done = subprocess.run(
        [sys.executable, "-m", "tandem", "evaluate", str(other), prefix, "--ai-framework", framework, *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, value in {"loss": alone.loss, **alone.metrics}.items():
        (shown,) = re.findall(rf"{name}\W+?(-?\d+\.\d+)", done.stdout)
        assert float(shown) == pytest.approx(value, abs=1e-4), name
