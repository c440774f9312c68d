"""Whole runs have a shallower toy: what is shown of them does not depend on its depth, and their time does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.random_init import RandomSource
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.models.experts import Experts
from tandem.models.hf_config import from_hf
from workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A toy job of two layers, which tests read and do not change."""
    return make_workspace(tmp_path_factory.mktemp("shallow"), num_layers=2)


@pytest.fixture(scope="session")
def pairs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output prefix of pairs, and of single answers beside it: `pairs` and `answers`."""
    folder = tmp_path_factory.mktemp("pairs")
    questions = json.loads(workspace.questions.read_text(encoding="utf-8"))[:24]
    rows = [
        {"instruction": row["instruction"], "input": "", "chosen": row["output"], "rejected": row["output"][:1] + "07"}
        for row in questions
    ]
    answers = [
        {"prompt": row["instruction"], "completion": row["output"], "label": number % 3 > 0}
        for number, row in enumerate(questions)
    ]
    for name, content in (("pairs", rows), ("answers", answers)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        options = PreprocessOptions(
            (str(folder / f"{name}.json"),), str(folder / f"{name}-data"), str(workspace.hf), prompt_type="qwen3"
        )
        preprocess(options)
    return folder


@pytest.fixture(scope="session")
def small_mixture(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's folder with 4 experts a layer, two for each token, and random weights."""
    config = from_hf(json.loads((workspace.hf / "config.json").read_text()), "test")
    experts = Experts(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16, norm_topk_prob=True)
    mixture = dataclasses.replace(config, model_type="qwen3_moe", experts=experts)
    companions = dataclasses.replace(companions_of(workspace.hf), hf_config=None)
    folder = tmp_path_factory.mktemp("mixture") / "hf"
    copy(RandomSource(mixture, 5), HFSink(folder, mixture, "float32", companions))
    return folder
