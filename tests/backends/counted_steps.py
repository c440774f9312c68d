"""Counts of whole steps, taken apart as `tandem plan` uses them (`planning/counted.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product

import pytest

from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.published import qwen3_config
from tandem.planning.counted import Counted
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import layer_activations, loss_chunks, stage_weights

FEW, MANY = 2048, 4096  # tokens of a micro-batch: one chunk of the loss, and two
# Size, layers, tokens of a micro-batch, micro-batches, recomputed layers -> kernels and bytes of a step.
Step = Callable[[str, int, int, int, int], "tuple[int, int]"]


def check(counted: Counted, size: str, step: Step, framework: str) -> None:
    """Whether a table agrees with counted steps: with kernels exactly, with bytes within a tenth."""
    cases = product((1, 2), (1, 2), (FEW, MANY), (False, True))
    found = {case: step(size, case[0], case[2], case[1], case[0] if case[3] else 0) for case in cases}

    def parts(what: int, tokens: int, again: bool = False) -> tuple[int, int, int, int]:
        """Of a layer in a micro-batch, of the rest of a micro-batch, of a layer's update, of the rest of a step."""
        one, two = ([found[layers, batches, tokens, again][what] for batches in (1, 2)] for layers in (1, 2))
        layer = (two[1] - two[0]) - (one[1] - one[0])
        batch, update = one[1] - one[0] - layer, two[0] - one[0] - layer
        return layer, batch, update, one[0] - layer - batch - update

    job = Job(
        config=dataclasses.replace(qwen3_config(size), num_layers=1), half=True, seq_length=MANY, ai_framework=framework
    )
    assert [loss_chunks(dataclasses.replace(job, seq_length=t), HARDWARE["h100"]) for t in (FEW, MANY)] == [1, 2]
    layer, batch, update, rest = parts(0, MANY)
    chunk = batch - parts(0, FEW)[1]
    again = parts(0, MANY, again=True)[0] - layer
    kernels = (layer, again, chunk, batch - 2 * chunk, update)
    known = (counted.layer, counted.again, counted.chunk, counted.micro_batch, counted.update)
    assert kernels == known, f"counted {kernels}, in the table {known}"
    assert rest <= counted.step, f"counted {rest}, in the table {counted.step}"
    moved, fewer = parts(1, MANY), parts(1, FEW)
    kept, of_tokens = layer_activations(job), (moved[0] - fewer[0]) * MANY / (MANY - FEW)
    weights = stage_weights(job, 0, trained=True).inside
    actual = (
        of_tokens / kept,
        (parts(1, MANY, again=True)[0] - moved[0]) / kept,
        (moved[0] - of_tokens) / weights,
        (moved[1] - fewer[1]) / (MANY - FEW) / job.config.vocab_size,
    )
    of_logit = counted.logit_bytes + counted.head_bytes * job.config.hidden_size / (MANY - FEW)
    expected = counted.passes, counted.passes_again, counted.gradient_bytes, of_logit
    assert actual == pytest.approx(expected, rel=0.1, abs=0.01), f"counted {actual}, in the table {expected}"


def check_kinds(counted: Counted, kernels: Callable[[ModelConfig, int], int]) -> None:
    """Whether a table agrees with counted layers that have experts, and that have adapters on all linear layers.

    `kernels`: of a step, for a model and a number of micro-batches.
    """
    mixture = qwen3_config("30B-A3B")
    assert mixture.experts is not None
    mixture = dataclasses.replace(mixture, experts=dataclasses.replace(mixture.experts, num_experts=16))
    adapted = dataclasses.replace(qwen3_config("0.6B"), lora=Lora())

    def of_layer(config: ModelConfig) -> int:
        one, two = (dataclasses.replace(config, num_layers=layers) for layers in (1, 2))
        return (kernels(two, 2) - kernels(two, 1)) - (kernels(one, 2) - kernels(one, 1))

    found = of_layer(mixture) - counted.layer, of_layer(adapted) - counted.layer
    assert found == (counted.experts, counted.adapters), f"counted {found}"
