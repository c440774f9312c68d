"""Whole runs have a shallower toy: what is shown of them does not depend on its depth, and their time does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from workspace import Workspace, make_mixture, make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A toy job of two layers, which tests read and do not change."""
    return make_workspace(tmp_path_factory.mktemp("shallow"), num_layers=2)


@pytest.fixture(scope="session")
def pairs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output prefix of pairs, and of single answers next to it: `pairs` and `answers`."""
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
    return make_mixture(workspace.hf, tmp_path_factory.mktemp("mixture") / "hf")
