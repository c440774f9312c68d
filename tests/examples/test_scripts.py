"""The example scripts run unedited, at toy size, from the first to the last step and across the frameworks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frameworks import require_framework
from scripts import (
    HF,
    HF2MCORE,
    INSTRUCTIONS,
    MCORE,
    MCORE2HF,
    PRETRAIN,
    PRETRAINED,
    TEXT,
    TUNE,
    TUNED,
    Finished,
    Site,
)
from tandem.checkpoints.detect import open_source
from tandem.launch.machines import free_port
from tandem.models.tensors import tensor_table
from tandem.quickstart.tasks import make_world
from tandem.quickstart.toy_model import write_toy_model

ALPACA = "dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
BF16 = 2e-3  # the scripts ask for bf16, which MindSpore does not compute on a CPU
SMALL = {"TRAIN_ITERS": 2, "GBS": 2, "SEQ_LENGTH": 64}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The guide's folders, with toys in the places of Qwen3-0.6B and of the alpaca file; converted, preprocessed."""
    root = tmp_path_factory.mktemp("site")
    world = make_world(seed=3, lists=60, held_out_lists=5)
    (root / HF).parent.mkdir()
    write_toy_model(root / HF, world.text, seed=3)
    (root / ALPACA).parent.mkdir()
    records = [{**question, "text": text} for question, text in zip(world.train, world.text * 4)]
    pq.write_table(pa.Table.from_pylist(records), root / ALPACA)
    site = Site(root)
    converted = site.succeed(HF2MCORE, PARAMS_DTYPE="fp32", TP=2, PP=2)
    assert converted.saved == [(1, Path(MCORE))]
    assert converted.last_line == "Done!"
    site.succeed(TEXT)
    site.succeed(INSTRUCTIONS)
    return site


@pytest.fixture(scope="module")
def pretrained(site: Site) -> Finished:
    """Two steps of MindSpore's pretraining script."""
    require_framework("mindspore")
    return site.train(PRETRAIN["mindspore"], **SMALL)


def test_conversion_keeps_every_bit(site: Site) -> None:
    done = site.succeed(MCORE2HF, PARAMS_DTYPE="fp32")
    assert f"saved Hugging Face model to {HF}/mg2hf" in done.output
    assert done.last_line == "Done!"
    before, after = open_source(site.root / HF), open_source(site.root / HF / "mg2hf")
    for name in tensor_table(before.config):
        np.testing.assert_array_equal(after.read(name), before.read(name))


def test_preprocessing_writes_the_guides_files(site: Site) -> None:
    keys = ("input_ids", "attention_mask", "labels")
    pairs = {f"alpaca_packed_{key}_document{suffix}" for key in keys for suffix in (".bin", ".idx")}
    assert {path.name for path in (site.root / "finetune_dataset").iterdir()} == {*pairs, "alpaca.json"}
    text = {"alpaca_text_document.bin", "alpaca_text_document.idx", "alpaca.json", Path(ALPACA).name}
    assert {path.name for path in (site.root / "dataset").iterdir()} == text


def test_mindspore_pretrains(site: Site, pretrained: Finished) -> None:
    assert len(pretrained.losses) == 2
    assert pretrained.saved == [(2, Path(PRETRAINED))]
    log = (site.root / "logs/train_qwen3_0point6b_ms.log").read_text()
    assert log == pretrained.output


def test_torch_computes_the_same_and_goes_on(site: Site, pretrained: Finished) -> None:
    """The same weights give the same losses, and MindSpore's run is resumed as it stands."""
    require_framework("torch")
    alone = site.train(PRETRAIN["torch"], **SMALL, CKPT_SAVE_DIR="ckpt/torch")
    np.testing.assert_allclose(alone.losses, pretrained.losses, rtol=BF16)
    resumed = site.train(PRETRAIN["torch"], **{**SMALL, "TRAIN_ITERS": 3}, CKPT_LOAD_DIR=PRETRAINED)
    assert "resuming at iteration 2, 4 samples consumed" in resumed.output
    assert len(resumed.losses) == 1
    assert resumed.saved == [(3, Path(PRETRAINED))]


@pytest.mark.slow("sizes")
def test_fine_tuning_and_export(site: Site, pretrained: Finished) -> None:
    """MindSpore fine-tunes the pretrained weights, PyTorch goes on from there, and the result becomes a HF folder."""
    require_framework("torch")
    first = site.train(TUNE["mindspore"], **SMALL, CKPT_LOAD_DIR=PRETRAINED)
    assert len(first.losses) == 2
    assert first.saved == [(2, Path(TUNED))]
    second = site.train(TUNE["torch"], **SMALL, CKPT_LOAD_DIR=TUNED, CKPT_SAVE_DIR="ckpt/again")
    assert f"weights from {TUNED}/iter_0000002" in second.output
    assert second.saved == [(2, Path("ckpt/again"))]
    assert site.succeed(MCORE2HF, LOAD_DIR="ckpt/again", SAVE_DIR="exported").last_line == "Done!"
    assert {"config.json", "tokenizer.json"} < {path.name for path in (site.root / "exported").iterdir()}


@pytest.mark.parametrize("variables", [{"CKPT_LOAD_DIR": ""}, {"INIT": "random"}], ids=str)
def test_random_weights_when_asked_for(site: Site, variables: dict[str, str]) -> None:
    require_framework("torch")
    save = "-".join(["ckpt/random", *variables])
    done = site.train(PRETRAIN["torch"], **SMALL, **variables, CKPT_SAVE_DIR=save)
    assert "weights from random" in done.output
    assert ("CKPT_LOAD_DIR is empty" in done.output) == (variables == {"CKPT_LOAD_DIR": ""})
    assert done.saved == [(2, Path(save))]


@pytest.mark.parametrize("script", [PRETRAIN["torch"], TUNE["torch"]])
def test_a_missing_checkpoint_is_an_error(site: Site, script: str) -> None:
    require_framework("torch")
    done = site.run(script, **SMALL, CKPT_LOAD_DIR="nowhere", CKPT_SAVE_DIR="ckpt/never")
    assert done.code == 2
    assert "nowhere does not exist" in done.last_line
    assert not (site.root / "ckpt/never").exists()


@pytest.mark.slow("users")
def test_the_documented_command_for_random_weights(site: Site) -> None:
    """Config and tokenizer alone become a model folder that every later step takes."""
    only_config = site.root / "config_dir"
    only_config.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(site.root / HF / name, only_config)
    command = "convert --load-model-type random --load-dir config_dir --save-model-type hf --save-dir random_hf"
    subprocess.run([sys.executable, "-m", "tandem", *command.split()], cwd=site.root, check=True)
    assert open_source(site.root / "random_hf").config == open_source(site.root / HF).config
    assert site.succeed(HF2MCORE, LOAD_DIR="random_hf", SAVE_DIR="random_mcore").saved == [(1, Path("random_mcore"))]


@pytest.mark.parametrize(
    ("framework", "processes", "layout"),
    [
        pytest.param("torch", 2, {"TP": 2}, marks=pytest.mark.slow("sizes")),
        pytest.param("mindspore", 2, {"PP": 2}, marks=pytest.mark.slow("users")),
        pytest.param("torch", 4, {"TP": 2, "PP": 2}, marks=pytest.mark.slow("users")),
        pytest.param("mindspore", 4, {"TP": 2, "PP": 2}, marks=pytest.mark.slow("users")),
    ],
)
def test_several_processes_give_the_same_losses(
    site: Site, pretrained: Finished, framework: str, processes: int, layout: dict[str, int]
) -> None:
    """With the guide's scripts and variables."""
    require_framework(framework)
    done = site.train(
        PRETRAIN[framework], **SMALL, **layout, NPUS_PER_NODE=processes, CKPT_SAVE_DIR=f"ckpt/{framework}{processes}"
    )
    np.testing.assert_allclose(done.losses, pretrained.losses, rtol=BF16)


@pytest.mark.slow("users")
def test_two_machines(site: Site, pretrained: Finished, framework: str) -> None:
    """Two launchers on loopback, each in a folder of its own: two nodes without shared storage."""
    port = free_port("127.0.0.1")
    other = Site(site.root.parent / f"{site.root.name}-{framework}-node1")
    shutil.copytree(site.root, other.root)
    common = {
        **SMALL,
        "EXTRA_ARGS": f"{SMALL.get('EXTRA_ARGS', '')} --no-shared-storage --use-distributed-optimizer",
        "NNODES": 2,
        "MASTER_PORT": port,
        "CKPT_SAVE_DIR": f"ckpt/{framework}-nodes",
    }

    def both(**variables: object) -> Finished:
        """Run on both machines; what the first printed."""
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(machine.run, PRETRAIN[framework], NODE_RANK=node, **{**common, **variables})
                for node, machine in enumerate((site, other))
            ]
            first, second = (run.result() for run in runs)
        assert (first.code, second.code) == (0, 0), first.output + second.output
        return first

    np.testing.assert_allclose(both().losses, pretrained.losses, rtol=BF16)
    for machine in (site, other):
        assert (machine.root / f"ckpt/{framework}-nodes/latest_checkpointed_iteration.txt").exists()
    goes_on = both(TRAIN_ITERS=3)
    assert "resuming at iteration 2" in goes_on.output
    assert len(goes_on.losses) == 1


@pytest.mark.parametrize("script", [HF2MCORE, MCORE2HF, TEXT, INSTRUCTIONS])
def test_a_failure_is_a_failure(site: Site, script: str) -> None:
    """The pipe into the log does not hide the exit code."""
    nowhere = {"LOAD_DIR": "nowhere", "SAVE_DIR": "never", "INPUT": "nowhere", "OUTPUT_PREFIX": "never/data"}
    done = site.run(script, **nowhere)
    assert done.code == 2
    assert "nowhere" in done.last_line
