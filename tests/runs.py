"""Whole toy runs, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tandem.checkpoints.detect import open_source
from tandem.models.tensors import tensor_table
from tandem.training.logs.log import StepRecord
from tandem.training.run import train
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


def assert_same_weights(one: Path, other: Path, iteration: int | None = None) -> None:
    """Weights and optimizer state of an iteration, by default the newest, are equal to the bit."""
    a, b = open_source(one, iteration), open_source(other, iteration)
    assert a.kinds() == b.kinds()
    for kind in a.kinds():
        for name in tensor_table(a.config):
            np.testing.assert_array_equal(a.read(name, kind), b.read(name, kind), err_msg=f"{kind} {name}")
