"""Suggested layouts fit, come fastest first, and every other size has its reason."""

from __future__ import annotations

import dataclasses

import pytest

from tandem.models.published import qwen3_config
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import peak_memory
from tandem.planning.search import suggest
from tandem.planning.speed import estimate


def test_suggestions_fit_and_are_ordered() -> None:
    hardware = HARDWARE["910b"]
    plans, rejected = suggest(Job(config=qwen3_config("8B"), global_batch_size=64, half=True), hardware, 16)
    steps = [plan.speed.step for plan in plans]
    assert plans
    assert steps == sorted(steps)
    for plan in plans:
        plan.job.check()
        assert plan.job.devices == 16
        assert plan.peak == peak_memory(plan.job, hardware) <= hardware.capacity
    sizes = {(plan.job.tensor_size, plan.job.pipeline_size) for plan in plans}
    refused = {size for sizes in rejected.values() for size in sizes}
    dividing = [1, 2, 4, 8, 16]
    assert sizes | refused == {(t, p) for t in dividing for p in dividing if t * p <= 16}
    assert not sizes & refused


def test_reasons() -> None:
    _, rejected = suggest(Job(config=qwen3_config("8B"), global_batch_size=8, half=True), HARDWARE["910b"], 128)
    reason_of = {size: reason for reason, sizes in rejected.items() for size in sizes}
    assert reason_of[1, 128] == "more stages than the 36 layers"
    assert "must share one node, which has 8 devices" in reason_of[16, 1]
    assert "--global-batch-size 8 is not a multiple" in reason_of[1, 1]
    plans, rejected = suggest(Job(config=qwen3_config("32B"), global_batch_size=2, half=True), HARDWARE["h100"], 1)
    assert not plans
    assert list(rejected.values()) == [[(1, 1)]]
    assert "GiB at least, and 72.0 may be used" in next(iter(rejected))


def test_layers_that_do_not_divide_are_spread() -> None:
    """The last stage, which has the head, gets no more than any other."""
    plans, _ = suggest(Job(config=qwen3_config("8B"), global_batch_size=64, half=True), HARDWARE["h100"], 8)
    (plan,) = [plan for plan in plans if plan.job.pipeline_size == 8]
    assert plan.job.layers_of_stages == [4, 4, 4, 5, 5, 5, 5, 4]


def test_weights_are_fully_sharded_where_that_is_faster_and_the_backend_can() -> None:
    base = Job(config=qwen3_config("32B"), global_batch_size=256, half=True)
    for framework, can in (("torch", True), ("mindspore", False)):
        plans, _ = suggest(Job(**{**vars(base), "ai_framework": framework}), HARDWARE["h100"], 8)
        assert plans
        assert plans[0].job.use_torch_fsdp2 is can
        assert not any(plan.job.use_torch_fsdp2 for plan in plans if plan.job.data_parallel_size == 1)


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_stages_are_interleaved_where_that_is_faster(framework: str) -> None:
    job = Job(config=qwen3_config("4B"), global_batch_size=64, half=True, ai_framework=framework)
    plans, _ = suggest(job, HARDWARE["a3"], 8)
    assert any(plan.job.chunks > 1 for plan in plans)


def test_ranks_share_experts_where_that_is_faster_or_the_only_way() -> None:
    config = dataclasses.replace(qwen3_config("30B-A3B"), num_layers=12)
    base = Job(config=config, global_batch_size=64, half=True)
    plans, _ = suggest(base, HARDWARE["910b"], 4)
    shared = [plan for plan in plans if plan.job.layout.expert_size > 1]
    assert shared
    for plan in shared:
        plan.job.check()
        layout = plan.job.layout
        alone = dataclasses.replace(layout, expert_model_parallel_size=1, expert_tensor_parallel_size=None)
        whole = dataclasses.replace(plan.job, layout=alone)
        assert (
            peak_memory(whole, HARDWARE["910b"]) > HARDWARE["910b"].capacity
            or estimate(whole, HARDWARE["910b"]).step >= plan.speed.step
        )
    dense, _ = suggest(dataclasses.replace(base, config=qwen3_config("4B")), HARDWARE["910b"], 4)
    assert all(plan.job.layout.expert_size == 1 for plan in dense)
