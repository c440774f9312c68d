"""A path that is no model folder is described as what it is, with the step that helps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.__main__ import main
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import TRACKER
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.parallel.layout import Layout
from toys import toy_config

CONFIG = toy_config()


def write_hf(folder: Path) -> Path:
    copy(RandomSource(CONFIG, 3), HFSink(folder, CONFIG, "float32", Companions()))
    return folder


def write_run(folder: Path, *iterations: int) -> Path:
    for iteration in iterations:
        copy(
            RandomSource(CONFIG, 3), NativeSink(folder, CONFIG, Layout(), {"model": "float32"}, iteration, Companions())
        )
    return folder


def touch(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def an_iteration(root: Path) -> Path:
    return write_run(root / "run", 3) / "iter_0000003"


def a_released_iteration(root: Path) -> Path:
    return touch(root / "run/release/mp_rank_00/model_optim_rng.pt").parent


def without_tracker(root: Path) -> Path:
    (write_run(root / "run", 3, 6) / TRACKER).unlink()
    return root / "run"


def parent(root: Path) -> Path:
    write_run(root / "runs/a", 3)
    return write_hf(root / "runs/b").parent


def trainer_output(root: Path) -> Path:
    for step in (500, 1000):
        touch(root / f"out/checkpoint-{step}/config.json")
        touch(root / f"out/checkpoint-{step}/trainer_state.json")
    return root / "out"


def hub_model(root: Path) -> Path:
    folder = root / "models--Qwen--Qwen3-0.6B"
    write_hf(folder / "snapshots/c1899de")
    touch(folder / "refs/main", "c1899de")
    return folder


def adapter(root: Path) -> Path:
    touch(root / "lora/adapter_model.safetensors")
    return touch(root / "lora/adapter_config.json", json.dumps({"base_model_name_or_path": "Qwen/Qwen3-0.6B"})).parent


def adapters_of_a_trainer(root: Path) -> Path:
    for number in (5, 20):
        touch(root / f"out/checkpoint-{number}/adapter_config.json")
    return root / "out"


def deepspeed(root: Path) -> Path:
    touch(root / "ds/zero_to_fp32.py")
    touch(root / "ds/config.json")
    return touch(root / "ds/global_step500/mp_rank_00_model_states.pt").parent.parent


def fully_sharded(root: Path) -> Path:
    return touch(root / "c/pytorch_model_fsdp_0/__0_0.distcp").parent.parent


def meta(root: Path) -> Path:
    touch(root / "llama/params.json")
    return touch(root / "llama/consolidated.00.pth").parent


def lfs_config(root: Path) -> Path:
    return touch(root / "hf/config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").parent


def dangling_link(root: Path) -> Path:
    (root / "link").symlink_to("gone")
    return root / "link"


def gguf(root: Path) -> Path:
    return touch(root / "model.Q4_K_M.gguf")


def other_weights(root: Path) -> Path:
    touch(root / "hf/model.fp16.safetensors")
    touch(root / "hf/tf_model.h5")
    return touch(root / "hf/config.json").parent


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an iteration": (an_iteration, r"one iteration of a checkpoint, .* give \S*run and --ckpt-step 3$"),
    "a rank's folder": (
        lambda root: an_iteration(root) / "mp_rank_00",
        r"a part of one iteration.*run and --ckpt-step 3$",
    ),
    "an iteration's hf": (lambda root: an_iteration(root) / "hf", r"a part of one iteration.*run and --ckpt-step 3$"),
    "a weight file of a run": (
        lambda root: an_iteration(root) / "mp_rank_00/model.safetensors",
        r"is a file: give \S*run and --ckpt-step 3$",
    ),
    "a released iteration": (a_released_iteration, r"a part of one iteration.* give \S*run$"),
    "no tracker": (without_tracker, rf"iterations 3, 6, but no {TRACKER}.*--ckpt-step 6 takes"),
    "a run's parent": (parent, r"no model itself; give one of .*runs/a, .*runs/b$"),
    "a Trainer's output": (trainer_output, r"output folder of a Trainer, .* 500, 1000, .*give \S*out/checkpoint-1000$"),
    "a Trainer's adapters": (
        adapters_of_a_trainer,
        r"output folder of a Trainer, .* 5, 20, .*give \S*out/checkpoint-20$",
    ),
    "a model in the hub's cache": (hub_model, r"of the hub's cache.* give \S*snapshots/c1899de$"),
    "its snapshots": (lambda root: hub_model(root) / "snapshots", r"of the hub's cache.* give \S*snapshots/c1899de$"),
    "the hub's cache": (lambda root: hub_model(root).parent, "the hub's cache, with models--Qwen--Qwen3-0.6B"),
    "an adapter": (adapter, r"PEFT adapter of the model Qwen/Qwen3-0\.6B.*--lora-load \S*lora$"),
    "DeepSpeed's files": (deepspeed, r"DeepSpeed.*python \S*ds/zero_to_fp32\.py \S*ds FOLDER"),
    "sharded files of PyTorch": (fully_sharded, r"accelerate merge-weights \S*pytorch_model_fsdp_0"),
    "Meta's files": (meta, r"params\.json, consolidated.*in Hugging Face's form"),
    "a Git-LFS pointer": (lfs_config, r"config\.json: a Git-LFS pointer.*git lfs pull"),
    "a dangling link": (dangling_link, "a link to gone, which is not there"),
    "a weight file": (lambda root: write_hf(root / "hf") / "model.safetensors", r"is a file: give the folder, \S*hf$"),
    "a config": (lambda root: write_hf(root / "hf") / "config.json", r"is a file: give the folder, \S*hf$"),
    "a tracker": (lambda root: write_run(root / "run", 3) / TRACKER, r"is a file: give the folder, \S*run$"),
    "some file": (lambda root: touch(root / "notes.txt"), "is a file: expected a folder"),
    "GGUF": (gguf, "GGUF file, whose weights are quantised"),
    "NeMo": (lambda root: touch(root / "qwen.nemo"), "a NeMo archive"),
    "weights of another form": (
        other_weights,
        r"holds no weights: .*there are model\.fp16\.safetensors, tf_model\.h5$",
    ),
    "weights without a config": (
        lambda root: touch(root / "w/model.safetensors").parent,
        r"holds weights, but no config\.json",
    ),
    "nothing": (lambda root: touch(root / "x/y").parent, r"neither a Hugging Face folder .*: it holds y$"),
    "an empty folder": (lambda root: root, "neither a Hugging Face folder .*: it is empty$"),
    "no folder": (lambda root: root / "nowhere", "nowhere does not exist: expected a Hugging Face folder"),
    "another spelling": (
        lambda root: write_hf(root / "qwen3") and root / "qwen",
        "does not exist.*did you mean 'qwen3'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_path_is_described_as_what_it_is(case: str, tmp_path: Path) -> None:
    make, expected = CASES[case]
    path = make(tmp_path)
    with pytest.raises(UserError) as raised:
        open_source(path)
    message = str(raised.value)
    assert re.search(expected, message), message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_the_step_that_a_message_names_works(tmp_path: Path) -> None:
    """For those that name a folder of ours."""
    assert open_source(an_iteration(tmp_path / "a").parent, 3).iteration == 3
    assert open_source(without_tracker(tmp_path / "b"), 6).iteration == 6
    open_source(hub_model(tmp_path / "c") / "snapshots/c1899de")
    open_source(parent(tmp_path / "d") / "b")


def test_a_name_on_the_hub_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert main(["inspect", "checkpoint", "Qwen/Qwen3-0.6B"]) == 2
    assert "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in "".join(capsys.readouterr().err.split("\n"))
    hub_model(tmp_path / "home/hub")
    assert main(["inspect", "checkpoint", "Qwen/Qwen3-0.6B"]) == 2
    assert "snapshots/c1899de" in capsys.readouterr().err


def test_iterations_that_are_there_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 3, 6)
    for command in (["export", "--save-dir", str(tmp_path / "o"), "--load"], ["generate", "--prompt", "x", "--load"]):
        assert main([*command, str(run), "--ckpt-step", "4"]) == 2
        assert "has no iteration 4; there are 3, 6" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(run / "iter_0000006")
    with pytest.raises(UserError, match=r"names iter_0000006, which is not there; there are 3: --ckpt-step 3 takes"):
        open_source(run)
    assert open_source(run, 3).iteration == 3


def test_a_folder_of_a_config_is_described_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--hf-cfg-dir`, and `--load-model-type random`."""
    run, words = write_run(tmp_path / "run", 3), ["--save-dir", str(tmp_path / "o")]
    assert main(["export", "--load", str(run), *words, "--hf-cfg-dir", str(trainer_output(tmp_path))]) == 2
    assert "output folder of a Trainer" in " ".join(capsys.readouterr().err.split())
    words = ["--load-model-type", "random", "--load-dir", str(adapter(tmp_path)), *words]
    assert main(["convert", *words]) == 2
    assert "PEFT adapter" in capsys.readouterr().err
