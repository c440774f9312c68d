"""What a run reads: blends, epochs, what is cut (C8, D7, H3)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess import PreprocessOptions, preprocess
from tandem.data.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.training.inputs import open_data, with_epochs
from workspace import Workspace


@pytest.fixture(scope="module")
def second(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("second") / "chat"
    preprocess(PreprocessOptions((str(workspace.questions),), str(prefix), str(workspace.hf), prompt_type="qwen3"))
    return prefix


def test_c8_a_blend_says_what_it_takes_of_each_source(workspace: Workspace, second: Path) -> None:
    data_path = ["1", str(workspace.instructions), "3", str(second)]
    settings = workspace.settings("torch", instructions=True, data_path=data_path, train_iters=10)
    data = open_data(settings, Tokenizer(workspace.hf))
    assert len(data.train) == 40
    assert data.template is not None
    assert data.template["prompt_type"] == "qwen3"
    assert f"{workspace.instructions}: weight 0.25," in data.notices[0]
    assert "30 used" in data.notices[1]
    by_size = workspace.settings("torch", instructions=True, data_path=data_path[1::2], train_iters=10, eval_iters=1)
    assert "weight 0.5," in open_data(by_size, Tokenizer(workspace.hf)).notices[0]


def test_c8_templates_of_a_blend_must_agree(workspace: Workspace, tmp_path: Path) -> None:
    other = tmp_path / "chat"
    options = PreprocessOptions((str(workspace.questions),), str(other), str(workspace.hf), prompt_type="qwen3")
    preprocess(dataclasses.replace(options, enable_thinking=True))
    data_path = [str(workspace.instructions), str(other)]
    settings = workspace.settings("torch", instructions=True, data_path=data_path)
    with pytest.raises(UserError, match="the records name different templates"):
        open_data(settings, Tokenizer(workspace.hf))


def test_d7_what_training_cuts_is_said(workspace: Workspace) -> None:
    lengths = IndexedDataset(f"{workspace.instructions}_packed_input_ids_document").lengths
    data = open_data(workspace.settings("torch", instructions=True), Tokenizer(workspace.hf))
    (notice,) = data.notices
    assert f"{np.count_nonzero(lengths > 32)} of {len(lengths)} conversations are longer than --seq-length 32" in notice
    longest = workspace.settings("torch", instructions=True, seq_length=int(lengths.max()))
    assert not open_data(longest, Tokenizer(workspace.hf)).notices


@pytest.mark.parametrize("instructions", [False, True])
def test_h3_epochs(workspace: Workspace, instructions: bool) -> None:
    values = {"instructions": instructions, "train_iters": None, "micro_batch_size": 1, "global_batch_size": 1}
    settings = with_epochs(workspace.settings("torch", epochs=2, reset_position_ids=not instructions, **values))
    data = open_data(settings, Tokenizer(workspace.hf))
    assert settings.total_samples == 2 * data.train.describe()["samples_per_epoch"]
    if instructions:
        seen = Counter(data.train[i].tokens.tobytes() for i in range(settings.total_samples))
        assert all(count % 2 == 0 for count in seen.values())  # equal conversations count together
    half = with_epochs(workspace.settings("torch", epochs=0.5, **values))
    assert abs(half.total_samples - settings.total_samples / 4) < 1
    for wrong in ({"epochs": -1}, {"epochs": 1, "train_samples": 4}):
        with pytest.raises(UserError, match="--epochs"):
            workspace.settings("torch", **{**values, **wrong}).check()
