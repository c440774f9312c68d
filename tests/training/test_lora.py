"""Runs that train adapters: what they save, how they go on, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runs import assert_same_weights, run
from tandem.__main__ import main
from tandem.checkpoints.adapters.peft import write_peft
from tandem.checkpoints.adapters.views import Adapted, merged
from tandem.checkpoints.detect import open_adapters, open_source
from tandem.conversion.as_trained import export
from tandem.conversion.options import ExportOptions
from tandem.errors import UserError
from tandem.models.lora import Lora
from tandem.models.published import qwen3_config
from tandem.models.tensors import is_trained, parameter_count, tensor_table, trained_count
from tandem.training.evaluate import evaluate_weights
from workspace import Workspace

LORA = {"lora_target_modules": "all-linear", "lora_r": 4, "lora_alpha": 8}
COMMON = {"instructions": True, "lr": 3e-3, "lr_warmup_iters": 0}
SHORT = {"train_iters": 6, **COMMON, **LORA}
GONE = {"iteration": 3, "sha256": "0"}


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on PyTorch."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("lora") / "run"
    run(workspace, "torch", save=str(folder), **SHORT)
    return folder


def test_a_checkpoint_holds_adapters_and_names_their_weights(workspace: Workspace, trained: Path) -> None:
    folder = trained / "iter_0000006"
    tensors = load_file(folder / "mp_rank_00" / "model.safetensors")
    source = open_source(trained)
    adapters = {name for name, spec in tensor_table(source.config).items() if is_trained(source.config, spec)}
    assert set(tensors) == adapters
    moments = load_file(folder / "mp_rank_00" / "optimizer.safetensors")
    assert set(moments) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in adapters}
    base = json.loads((folder / "index.json").read_text())["base"]
    assert (base["folder"], base["iteration"]) == (str(workspace.hf.resolve()), None)
    whole = open_source(workspace.hf)
    for name in tensor_table(whole.config):
        np.testing.assert_array_equal(source.read(name), whole.read(name))


def test_a_checkpoint_has_the_adapters_share_of_a_full_one(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    run(workspace, "torch", save=str(tmp_path / "full"), **{**COMMON, "train_iters": 1})
    sizes = [
        sum(tensor.nbytes for file in folder.glob("iter_*/*/*.safetensors") for tensor in load_file(file).values())
        for folder in (trained, tmp_path / "full")
    ]
    config = open_source(trained).config
    assert sizes[0] * parameter_count(config.without_adapters) == sizes[1] * trained_count(config)


@pytest.mark.parametrize(
    "targets", ["all-linear", ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), ("q_proj", "v_proj")]
)
def test_the_share_at_06b_is_as_the_page_says(targets: tuple[str, ...] | str) -> None:
    config = qwen3_config("0.6B")
    adapted = dataclasses.replace(config, lora=Lora(r=16, target_modules=targets))
    share = f"{trained_count(adapted) / parameter_count(config) * 100:.2f} %"
    page = " ".join((Path(__file__).parents[2] / "docs/lab/performance.md").read_text(encoding="utf-8").split())
    name = f"`{targets if isinstance(targets, str) else ' '.join(targets)}`"
    assert f"{share} with {name}" in page


def test_adapters_are_described_where_their_weights_are_gone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    index = run / "iter_0000006/index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"base": {"folder": "/gone", **GONE}}))
    assert main(["inspect", "checkpoint", str(run)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "LoRA adapters" in out
    assert re.search(r"q_proj │ \d+ │ 4 │ 8 │ none", out)
    assert "weights │ not here: in /gone, iteration 3" in out


def test_without_the_filter_a_checkpoint_holds_everything(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    run(workspace, framework, save=str(tmp_path / "run"), lora_ckpt_filter=False, **{**SHORT, "train_iters": 2})
    source = open_source(tmp_path / "run")
    assert not isinstance(source, Adapted)
    assert source.kinds_of("output_layer.weight" if not source.config.tied else "decoder.final_layernorm.weight") == (
        "model",
    )
    run(workspace, framework, save=str(tmp_path / "run"), lora_ckpt_filter=False, **{**SHORT, "train_iters": 3})


@pytest.mark.parametrize("changes", [{}, {"lora_use_dora": True}, {"lora_dropout": 0.2}])
def test_resuming_is_bitwise(workspace: Workspace, framework: str, changes: dict[str, object], tmp_path: Path) -> None:
    settings = {**SHORT, **changes, "save_interval": 3}
    whole = run(workspace, framework, save=str(tmp_path / "a"), **settings)
    first = run(workspace, framework, save=str(tmp_path / "b"), exit_interval=4, **settings)
    rest = run(workspace, framework, save=str(tmp_path / "b"), **settings)
    assert [*first, *rest] == whole
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_adapters_that_are_kept_are_no_changed_settings(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace, "torch", save=str(tmp_path), **{**SHORT, "train_iters": 1})
    capsys.readouterr()
    run(workspace, "torch", save=str(tmp_path), **COMMON, train_iters=2)
    out = capsys.readouterr().out
    assert "> LoRA: r 4, alpha 8, on all-linear\n" in out
    table = out[out.index("> setting") :].splitlines()[1:]
    assert table[0].split()[1:] == ["train_iters", "1", "2"]
    assert not any("lora_" in line for line in table)


def test_a_run_goes_on_on_the_other_backend(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("mindspore")
    settings = {**SHORT, "train_iters": 9}
    losses = []
    for framework in ("torch", "mindspore"):
        shutil.copytree(trained, tmp_path / framework)
        losses.append(run(workspace, framework, save=str(tmp_path / framework), **settings))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_other_weights_under_the_same_path_are_refused(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    shutil.copytree(workspace.hf, tmp_path / "hf")
    settings = {**SHORT, "train_iters": 2, "load": str(tmp_path / "hf"), "save": str(tmp_path / "run")}
    run(workspace, framework, **settings)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="sha256"):
        run(workspace, framework, **{**settings, "train_iters": 3})
    with pytest.raises(UserError, match="sha256"):
        export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_weights_that_moved_are_given_by_hand(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    index = tmp_path / "run" / "iter_0000006" / "index.json"
    content = json.loads(index.read_text())
    content["base"]["folder"] = str(tmp_path / "gone")
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"--lora-load {tmp_path / 'run'}") as caught:
        open_source(tmp_path / "run")
    assert str(tmp_path / "gone") in str(caught.value)
    source = open_adapters(tmp_path / "run", open_source(workspace.hf))
    name = next(iter(tensor_table(source.config)))
    assert source.read(name).any()


def test_a_run_goes_on_where_its_weights_have_moved(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    shutil.copytree(workspace.hf, tmp_path / "old")
    settings = {**SHORT, "save": str(tmp_path / "run")}
    first = run(workspace, framework, load=str(tmp_path / "old"), **{**settings, "exit_interval": 3})
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(UserError, match=r"cannot be opened.*--load FOLDER"):
        run(workspace, framework, load=str(tmp_path / "old"), **settings)
    rest = run(workspace, framework, load=str(tmp_path / "new"), **settings)
    whole = run(workspace, framework, **{**settings, "save": str(tmp_path / "whole")})
    assert [*first, *rest] == whole
    base = json.loads((tmp_path / "run/iter_0000006/index.json").read_text())["base"]
    assert base["folder"] == str(tmp_path / "new")  # from now on
    run(workspace, framework, load=str(tmp_path / "new"), **{**settings, "train_iters": 7})
    with pytest.raises(UserError, match=f"--ckpt-step 3 is an iteration of --load {tmp_path / 'new'}"):
        run(workspace, framework, load=str(tmp_path / "new"), ckpt_step=3, **{**settings, "train_iters": 8})
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    save_file({name: 2 * values for name, values in tensors.items()}, tmp_path / "other.safetensors", {"format": "pt"})
    (tmp_path / "new").rename(tmp_path / "newer")
    (tmp_path / "other.safetensors").rename(tmp_path / "newer" / "model.safetensors")
    with pytest.raises(UserError, match="sha256"):
        run(workspace, framework, load=str(tmp_path / "newer"), **{**settings, "train_iters": 8})
    shutil.rmtree(tmp_path / "newer")
    with pytest.raises(UserError, match=f"which were in {tmp_path / 'new'}, cannot be opened.*--lora-load"):
        run(workspace, framework, load=str(tmp_path / "run"), **{**settings, "train_iters": 8})


def test_adapters_of_a_run_start_another(workspace: Workspace, framework: str, trained: Path, tmp_path: Path) -> None:
    """--lora-load RUN --finetune takes the adapters alone; without --finetune the run goes on."""
    base = {**COMMON, "lora_load": str(trained)}
    again: list[int] = []
    run(workspace, framework, lambda r: again.append(r.iteration), finetune=True, train_iters=2, **base)
    assert again == [1, 2]
    further: list[int] = []
    run(workspace, framework, lambda r: further.append(r.iteration), train_iters=8, **base)
    assert further == [7, 8]


def test_a_peft_folder_is_trained_on(workspace: Workspace, framework: str, trained: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", open_source(trained), str(workspace.hf))
    settings = {**COMMON, "lora_load": str(tmp_path / "peft"), "train_iters": 2}
    from_peft = run(workspace, framework, save=str(tmp_path / "run"), **settings)
    from_run = run(workspace, framework, **{**settings, "lora_load": str(trained), "finetune": True})
    assert from_peft == from_run
    assert run(workspace, framework, save=str(tmp_path / "run"), **{**settings, "train_iters": 3})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 8}, ("--lora-r 8", "4")),
        ({"lora_alpha": 2}, ("--lora-alpha 2", "8")),
        ({"lora_use_dora": True}, ("--lora-use-dora",)),
        ({"lora_target_modules": "q_proj"}, ("--lora-target-modules q_proj",)),
    ],
)
def test_flags_that_contradict_the_adapters_are_refused(
    workspace: Workspace, trained: Path, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        run(workspace, "torch", instructions=True, finetune=True, lora_load=str(trained), **changes)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_target_modules": "q_prj"}, ("q_prj", "q_proj", "linear_qkv")),
        ({"lora_target_modules": ["q_proj", "linear_qkv"]}, ("linear_qkv", "q_proj")),
        ({"lora_r": 0}, ("--lora-r 0",)),
        ({"lora_dropout": 1.0}, ("--lora-dropout 1",)),
        ({"lora_dropout": 0.1, "lora_use_dora": True}, ("--lora-dropout 0.1", "--lora-use-dora")),
    ],
)
def test_wrong_adapters_are_refused(workspace: Workspace, changes: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        run(workspace, "torch", **{**SHORT, **changes})
    assert all(word in str(caught.value) for word in words)


def test_a_dropout_of_zero_is_heard(workspace: Workspace, tmp_path: Path) -> None:
    settings = {**SHORT, "train_iters": 1, "save": str(tmp_path / "run"), "lora_dropout": 0.2}
    run(workspace, "torch", **settings)
    with pytest.raises(UserError, match=r"--lora-dropout 0 .* 0\.2"):
        run(workspace, "torch", **{**settings, "lora_dropout": 0.0, "train_iters": 2})


def test_second_adapters_are_refused(workspace: Workspace, trained: Path) -> None:
    with pytest.raises(UserError, match="has adapters already"):
        run(workspace, "torch", **{**COMMON, "load": str(trained), "lora_load": str(trained), "finetune": True})
    with pytest.raises(UserError, match="has adapters already"):
        open_adapters(trained, open_source(trained))


def test_a_merge_has_no_masters_of_its_own(workspace: Workspace, tmp_path: Path) -> None:
    """The weights may come from a run with fp32 masters, which know nothing of the adapters."""
    run(workspace, "torch", save=str(tmp_path / "half"), fp16=True, **{**COMMON, "train_iters": 1})
    settings = {**SHORT, "load": str(tmp_path / "half"), "finetune": True, "save": str(tmp_path / "lora")}
    run(workspace, "torch", **{**settings, "train_iters": 2})
    source = merged(open_source(tmp_path / "lora"))
    assert {source.kinds_of(name) for name in tensor_table(source.config)} == {("model",)}


def test_settings_of_adapters_without_adapters_are_refused(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="--lora-target-modules"):
        run(workspace, "torch", instructions=True, lora_r=8)


def test_adapters_are_not_saved_among_their_weights(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, "torch", train_iters=1, **COMMON, save=str(tmp_path / "full"))
    settings = {**SHORT, "load": str(tmp_path / "full"), "save": str(tmp_path / "full"), "finetune": True}
    with pytest.raises(UserError, match="--save"):
        run(workspace, "torch", **settings)


def test_adapters_on_an_iteration_of_a_run(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    run(workspace, framework, train_iters=1, **COMMON, save=str(tmp_path / "full"))
    settings = {**SHORT, "load": str(tmp_path / "full"), "save": str(tmp_path / "lora"), "finetune": True}
    run(workspace, framework, **{**settings, "train_iters": 2})
    assert run(workspace, framework, **{**settings, "train_iters": 3})
    base = json.loads((tmp_path / "lora" / "iter_0000003" / "index.json").read_text())["base"]
    assert (Path(base["folder"]).name, base["iteration"]) == ("full", 1)


def test_a_merge_that_changes_nothing_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, "torch", save=str(tmp_path / "run"), **{**SHORT, "train_iters": 1, "lr": 0.0, "min_lr": 0.0})
    with pytest.raises(UserError, match="zero"):
        export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "out")))


def test_evaluation_and_export_see_the_adapters(
    workspace: Workspace, framework: str, trained: Path, tmp_path: Path
) -> None:
    export(ExportOptions(str(trained), str(tmp_path / "merged")))
    places = {
        "run": {"load": str(trained)},
        "separate": {"load": str(workspace.hf), "lora_load": str(trained)},
        "merged": {"load": str(tmp_path / "merged")},
        "base": {"load": str(workspace.hf)},
    }
    losses = {}
    for name, values in places.items():
        data = {"valid_data_path": str(workspace.instructions), "instructions": True, "eval_iters": "full"}
        (result,) = evaluate_weights(workspace.settings(framework, **data, **values))[0].values()
        losses[name] = result.loss
    assert losses["run"] == losses["separate"]
    assert losses["merged"] == pytest.approx(losses["run"], rel=1e-5)
    assert abs(losses["base"] - losses["run"]) > 0.1


def test_new_adapters_are_not_evaluated(workspace: Workspace) -> None:
    data = {"valid_data_path": str(workspace.instructions), "instructions": True, "eval_iters": "full"}
    with pytest.raises(UserError, match=r"--lora-target-modules q_proj: .* has no adapters: give theirs with --lora-"):
        evaluate_weights(workspace.settings("torch", load=str(workspace.hf), lora_target_modules="q_proj", **data))


def test_configs_with_and_without_adapters_come_back_from_json(trained: Path) -> None:
    config = open_source(trained).config
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "lora" not in dataclasses.replace(config, lora=None).to_dict()
