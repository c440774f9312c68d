"""Finds and records why a step went wrong: where the first bad number is, and on which samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tandem.backends.interface import Engine
from tandem.checkpoints.formats.arrays import is_finite
from tandem.data.batch import MicroBatch
from tandem.files.publish import write_text_atomically
from tandem.launch.world import Communicator

BAD_STEPS = "bad_steps"  # folder in --save


def first_bad(engine: Engine, micro_batches: Sequence[MicroBatch], weights: Sequence[np.ndarray]) -> str | None:
    """The first place, in order of computation, where this rank has a number that is not finite. Collective."""
    tensors = [f"{kind} tensor {shard.spec.name}" for kind, shard, values in engine.tensors() if not is_finite(values)]
    output = engine.first_bad_output(micro_batches)
    _, gradients = engine.loss_and_gradients(micro_batches, weights)
    # The gradients of the last layers are computed first.
    bad_gradients = [f"gradient of {name}" for name in reversed(gradients) if not is_finite(gradients[name])]
    return next(iter([*tensors[:1], *([f"output of {output}"] if output else []), *bad_gradients[:1]]), None)


def dump(
    folder: Path | None, communicator: Communicator, iteration: int, values: dict[str, Any], first: str | None
) -> str:
    """Write what this rank knows about a bad step as JSON. Collective.

    Returns:
        A text that names the first bad place on each rank, and the folder with the details.
    """
    rank = communicator.world.rank
    if folder is not None:
        path = folder / BAD_STEPS / f"iter_{iteration:07d}_rank_{rank:05d}.json"
        content = {"iteration": iteration, "rank": rank, **values, "first_bad": first}
        write_text_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    places = [f"rank {number}: {place}" for number, place in enumerate(communicator.all_gather(first)) if place]
    summary = f"First bad: {'; '.join(places)}" if places else "All tensors are finite"
    return f"{summary}. Details: {folder / BAD_STEPS}" if folder else summary
