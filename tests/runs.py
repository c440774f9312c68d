"""Whole toy runs, and what they leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tandem.checkpoints.detect import open_source
from tandem.config.settings import Settings
from tandem.data.preprocess.cache import Wait, wait_for
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.models.tensors import tensor_table
from tandem.training.logs.log import StepRecord
from tandem.training.run import train
from tandem.training.start import data, epochs, raw_data
from tandem.training.start.state import TrainerState
from workspace import Workspace


def run(
    workspace: Workspace, framework: str, act: Callable[[StepRecord], None] | None = None, **values: object
) -> list[float]:
    """Train with these settings; `act` hears of each step. Returns the losses."""
    losses = []

    def on_step(record: StepRecord) -> None:
        losses.append(record.loss)
        if act:
            act(record)

    train(workspace.settings(framework, **values), on_step)
    return losses


def open_data(settings: Settings, tokenizer: Tokenizer | None, resumed: TrainerState | None = None) -> data.Data:
    """The data of a run."""
    return data.open_data(settings.data, settings.training, tokenizer, resumed)


def with_epochs(settings: Settings) -> Settings:
    """The settings of a run with its epochs as iterations."""
    return dataclasses.replace(settings, training=epochs.with_epochs(settings.data, settings.training))


def with_preprocessed(settings: Settings, leader: bool = True, wait: Wait = wait_for) -> Settings:
    """The settings of a run with its raw files as the prefixes of what they became."""
    load, folder = settings.checkpoint.load, settings.data.tokenizer_name_or_path
    tokenizer = data.open_tokenizer(folder, open_source(load, None)) if load else None
    return dataclasses.replace(settings, data=raw_data.with_preprocessed(settings.data, tokenizer, leader, wait))


def assert_same_weights(one: Path, other: Path, iteration: int | None = None) -> None:
    """Weights and optimizer state of an iteration, by default the newest, are equal to the bit."""
    a, b = open_source(one, iteration), open_source(other, iteration)
    assert a.kinds() == b.kinds()
    for kind in a.kinds():
        for name in tensor_table(a.config):
            np.testing.assert_array_equal(a.read(name, kind), b.read(name, kind), err_msg=f"{kind} {name}")
