"""Runs of mixtures of experts: what they say of the experts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest

from runs import assert_same_weights, run
from tandem.checkpoints.detect import open_source
from tandem.conversion.as_trained import export
from tandem.conversion.options import ExportOptions
from tandem.errors import UserError
from tandem.models.experts import Experts
from tandem.models.hf_config import from_hf, to_hf
from tandem.report.page import render
from tandem.report.run_folder import read_runs
from tandem.training.evaluate import evaluate_weights
from tandem.training.logs.events import read_events
from tandem.training.logs.expert_loads import EXPERT_LOADS, read_expert_loads
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from workspace import Workspace

NAMES = {"load_balancing_loss", "z_loss", "max_expert_load", "idle_experts"}


@pytest.fixture
def hf(workspace: Workspace, tmp_path: Path) -> Path:
    """The toy with 64 experts a layer, one for each token: some get none."""
    folder = tmp_path / "moe"
    shutil.copytree(workspace.hf, folder, ignore=shutil.ignore_patterns("*.safetensors*", "tandem.json"))
    config = from_hf(json.loads((folder / "config.json").read_text()), "test")
    experts = Experts(num_experts=64, moe_router_topk=1, moe_ffn_hidden_size=8, norm_topk_prob=False)
    moe = dataclasses.replace(config, model_type="qwen3_moe", experts=experts)
    (folder / "config.json").write_text(json.dumps(to_hf(moe, dtype="float32")))
    return folder


def test_logged_steps_tell_how_busy_experts_are(
    workspace: Workspace, framework: str, hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with caplog.at_level(logging.INFO, logger="tandem"):
        run(
            workspace,
            framework,
            init="random",
            hf_cfg_dir=str(hf),
            save=str(folder),
            train_iters=5,
            log_interval=2,
            moe_aux_loss_coeff=0.01,
        )
    steps = read_metrics(folder / METRICS_FILE)
    assert [step["iteration"] for step in steps if NAMES & step.keys()] == [1, 2, 4, 5]  # the logged ones
    assert all(step.keys() >= NAMES and step["load_balancing_loss"] > 0.9 for step in steps if NAMES & step.keys())
    assert steps[0]["max_expert_load"] > 1.0
    lines = [record.getMessage() for record in caplog.records if " iteration " in record.getMessage()]
    assert f"| load_balancing_loss: {steps[0]['load_balancing_loss']:.6E} |" in lines[0]
    idle = [event for event in read_events(folder) if event["event"] == "idle experts"]
    assert idle
    assert "layer 0: " in idle[0]["experts"]
    assert any("experts without a token in two logged steps in a row: layer 0: " in line for line in caplog.messages)
    page = render(read_runs([str(folder)]))
    assert "Load of the busiest expert" in page
    loads = read_expert_loads(folder / EXPERT_LOADS)
    assert [of_step.iteration for of_step in loads] == [1, 2, 4, 5]
    assert all(of.sum() == steps[0]["tokens"] for of_step in loads for of in of_step.counts.values())
    assert (loads[0].counts[0] == 0).sum() > 0
    assert "Load of the 64 experts of layer 0" in page


LORA = {"lora_target_modules": "all-linear", "lora_r": 4, "lora_alpha": 8}
SHORT = {"instructions": True, "train_iters": 4, "lr": 3e-3, "lr_warmup_iters": 0, "finetune": True}


@pytest.mark.slow("jobs")
def test_adapters_of_experts_go_on_and_come_out(
    workspace: Workspace, framework: str, small_mixture: Path, tmp_path: Path
) -> None:
    """Resumed bit for bit, on the other framework as on this one; merged, and next to their weights, the same."""
    settings = {"load": str(small_mixture), **SHORT, **LORA, "finetune": False}
    whole = run(workspace, framework, save=str(tmp_path / "a"), **settings)
    first = run(workspace, framework, save=str(tmp_path / "b"), exit_interval=2, **settings)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert [*first, *run(workspace, framework, save=str(tmp_path / "b"), **settings)] == whole
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    (other,) = {"torch", "mindspore"} - {framework}
    if importlib.util.find_spec(other):
        rest = run(workspace, other, save=str(tmp_path / "c"), **settings)
        assert [*first, *rest] == pytest.approx(whole, rel=1e-5)

    export(ExportOptions(str(tmp_path / "a"), str(tmp_path / "merged")))
    done = export(ExportOptions(str(tmp_path / "a"), str(tmp_path / "peft"), save_lora_to_hf=True))
    assert done.tensors == 2 * 2 * (5 + 3 * 4)  # A and B of two layers: q, k, v, o, router, and three of each expert
    data = {"valid_data_path": str(workspace.instructions), "instructions": True, "eval_iters": "full"}
    losses = []
    for places in (
        {"load": str(small_mixture), "lora_load": str(tmp_path / "peft")},
        {"load": str(tmp_path / "merged")},
    ):
        (result,) = evaluate_weights(workspace.settings(framework, **data, **places))[0].values()
        losses.append(result.loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] < whole[0] - 0.05


def test_what_adapters_of_experts_cannot_have_is_said(
    workspace: Workspace, small_mixture: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    for changes, words in (
        ({"lora_dropout": 0.1}, "--lora-dropout 0.1 is not supported on gate"),
        ({"lora_use_dora": True}, "--lora-use-dora is not supported on gate"),
        (
            {"lora_target_modules": "gate_up_proj"},
            "--lora-target-modules gate_up_proj: expected all-linear, or some of",
        ),
    ):
        with pytest.raises(UserError, match=words):
            run(workspace, "torch", load=str(small_mixture), **SHORT, **{**LORA, **changes})
    folder = tmp_path / "run"
    targets = {"lora_target_modules": ["up_proj"]}
    run(workspace, "torch", load=str(small_mixture), save=str(folder), **{**SHORT, **LORA, **targets, "train_iters": 1})
    done = export(ExportOptions(str(folder), str(tmp_path / "peft"), save_lora_to_hf=True))
    assert "of gate_proj and up_proj it opens both, or none" in done.notices[-1]
    assert open_source(folder).config.lora is not None
