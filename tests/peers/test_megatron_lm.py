"""Megatron-LM itself loads what is written here, its `args` included, and what its trainer saves is read.

It is no package: MEGATRON_LM=FOLDER names a clone of github.com/NVIDIA/Megatron-LM (core_v0.16.1 was used).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ours import our_logits
from toy_work import toy_batch, toy_weights

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout
from toys import DENSE_TOYS

JOB = Path(__file__).with_name("megatron_lm_job.py")


@pytest.fixture
def megatron_lm() -> str:
    if not os.environ.get("MEGATRON_LM"):
        pytest.skip("MEGATRON_LM is not set: it names a clone of github.com/NVIDIA/Megatron-LM, at core_v0.16.1")
    return os.environ["MEGATRON_LM"]


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("model", DENSE_TOYS)
def test_megatron_lm_loads_computes_and_saves(megatron_lm: str, model: str, tmp_path: Path) -> None:
    """Besides the file, it gets only the flags that `--use-checkpoint-args` leaves out."""
    config = DENSE_TOYS[model]
    source, batch = toy_weights(config), toy_batch(config, (40,))
    copy(source, MegatronSink(tmp_path, config, Layout(), "float32"))
    np.save(tmp_path / "tokens.npy", batch.tokens.astype(np.int64))
    flags = ["--norm-epsilon", str(config.norm_epsilon), *(["--qk-layernorm"] if config.qk_layernorm else [])]
    words = [sys.executable, str(JOB), megatron_lm, str(tmp_path / "tokens.npy"), str(tmp_path), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"}
    subprocess.run(words, check=True, timeout=300, env=environment)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), our_logits(source, batch), atol=1e-4, rtol=0)
    again = open_source(tmp_path / "again")
    assert {**again.config.to_dict(), "init_method_std": config.init_method_std} == config.to_dict()
    for name in tensor_table(config):
        np.testing.assert_array_equal(again.read(name), source.read(name), err_msg=name)
