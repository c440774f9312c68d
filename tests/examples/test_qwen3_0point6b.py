"""The example scripts at Qwen3-0.6B's real size: its config and tokenizer, random weights, real data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from frameworks import require_framework
from scripts import HF, HF2MCORE, INSTRUCTIONS, MCORE, MCORE2HF, PRETRAIN, PRETRAINED, TEXT, TUNE, TUNED, Site
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.interface import DTYPES
from tandem.models.tensors import EMBEDDING

pytestmark = pytest.mark.slow("users")
# A checkpoint with its optimizer would take 7 GB.
SMALL = {
    "TRAIN_ITERS": 2,
    "GBS": 1,
    "SEQ_LENGTH": 128,
    "EXTRA_ARGS": "--no-save-optim",
    "OMP_NUM_THREADS": os.cpu_count(),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Iterator[Site]:
    """Random weights by the documented command, converted; real text and questions, preprocessed."""
    root = tmp_path_factory.mktemp("qwen3")
    try:
        random = ("--load-model-type", "random", "--load-dir", str(shared_data / "qwen3-0.6b"))
        target = ("--save-model-type", "hf", "--save-dir", str(root / HF))
        subprocess.run([sys.executable, "-m", "tandem", "convert", *random, *target], check=True)
        site = Site(root)
        site.succeed(HF2MCORE)
        site.succeed(TEXT, INPUT=shared_data / "text/free.jsonl", WORKERS=2)
        site.succeed(INSTRUCTIONS, INPUT=shared_data / "instruct/gsm8k_train_alpaca.json", WORKERS=2)
        yield site
    finally:
        shutil.rmtree(root)


def test_random_weights_are_bf16_as_the_config_says(site: Site) -> None:
    source = open_source(site.root / HF)
    assert source.dtype(EMBEDDING) == DTYPES["bfloat16"]
    assert source.read(EMBEDDING).shape == (151_936, 1024)
    assert {"tokenizer.json", "vocab.json", "generation_config.json"} <= {path.name for path in source.companions.files}


def test_both_frameworks_train(site: Site) -> None:
    """Two steps each of pretraining from the same weights, then of fine-tuning from MindSpore's; then export."""
    require_framework("mindspore")
    require_framework("torch")
    losses = {}
    for framework in ("torch", "mindspore"):
        shutil.rmtree(site.root / PRETRAINED, ignore_errors=True)
        done = site.train(PRETRAIN[framework], **SMALL)
        assert done.saved == [(2, Path(PRETRAINED))]
        losses[framework] = done.losses
    assert losses["mindspore"][0] == pytest.approx(np.log(151_936), abs=0.5)
    # The scripts ask for bf16, which MindSpore does not compute on a CPU.
    np.testing.assert_allclose(losses["torch"], losses["mindspore"], rtol=2e-3)
    shutil.rmtree(site.root / MCORE)
    for framework in ("torch", "mindspore"):
        shutil.rmtree(site.root / TUNED, ignore_errors=True)
        done = site.train(TUNE[framework], **SMALL, CKPT_LOAD_DIR=PRETRAINED)
        assert done.saved == [(2, Path(TUNED))]
        assert len(done.losses) == 2
    assert site.succeed(MCORE2HF, LOAD_DIR=TUNED, SAVE_DIR="exported").last_line == "Done!"
    assert open_source(site.root / "exported").dtype(EMBEDDING) == DTYPES["bfloat16"]
