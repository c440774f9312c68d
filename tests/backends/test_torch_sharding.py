"""Fully sharded weights are whole only while their layer computes (F: `--use-torch-fsdp2`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toy_work import toy_batch

from tandem.backends.torch.communication import Ranks
from tandem.backends.torch.data_parallel import Replicated, Sharing
from tandem.backends.torch.fully_sharded import FullySharded
from tandem.backends.torch.functional import Gradient
from tandem.backends.torch.inputs import arrive, send
from tandem.backends.torch.loss import Targets, cross_entropy_and_gradient
from tandem.backends.torch.model import Build, Chunk, GPTModel
from tandem.parallel.layout import Slot
from toys import toy_config

CPU = torch.device("cpu")
CONFIG = toy_config(num_layers=5)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    """A group of one process: everything is gathered and freed as among many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Ranks(dist.group.WORLD, 0, 1)
    dist.destroy_process_group()


def build(
    dtype: torch.dtype, recompute_layers: int, sharded: FullySharded | None = None
) -> tuple[GPTModel, dict[str, torch.nn.Parameter]]:
    """A toy of five layers and its weights, which have no values yet."""
    kept = dtype if sharded is None else torch.float32
    shard = None if sharded is None else sharded.add
    slots = tuple(Slot(number, number) for number in range(5))
    model = GPTModel(Build(CONFIG, kept, CPU, None, shard=shard), Chunk(slots, True, True), recompute_layers)
    return model, dict(model.named_parameters())


def fill(sharing: Sharing, weights: dict[str, torch.nn.Parameter]) -> None:
    sharing.prepare(list(weights.values()), training=True)
    generator = torch.Generator().manual_seed(1)
    for weight in weights.values():
        kept = sharing.kept(weight)
        kept.copy_(torch.randn(kept.shape, generator=generator).mul_(0.1).bfloat16())


def step(model: GPTModel, sharing: Sharing, dtype: torch.dtype) -> None:
    sharing.begin(gradients=True)
    for last, lengths in enumerate(((9, 4), (3, 8))):
        batch = toy_batch(CONFIG, lengths)
        hidden = model(arrive(CONFIG, send(batch, CPU, None), dtype, CPU), None)
        labels = torch.from_numpy(batch.tokens.astype(np.int64))
        same = torch.ones(len(labels), 1, dtype=torch.float64)
        targets = Targets(labels, same / 24, 1 / 24, same)
        _, gradient = cross_entropy_and_gradient(hidden.detach(), model.head, targets)
        sharing.before_backward(model, last=bool(last))
        hidden.backward(gradient)
    sharing.end()
    sharing.reduce()


def wholes(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What the weights of a module are while they are whole."""
    assert isinstance(module, FSDPModule)
    module.unshard()
    weights = [weight for weight in module.parameters() if not isinstance(weight, DTensor)]
    module.reshard()
    return weights


def is_whole(weights: list[torch.nn.Parameter]) -> bool:
    sizes = {weight.untyped_storage().nbytes() > 0 for weight in weights}
    assert len(sizes) == 1, "weights of a layer come and go together"
    return sizes.pop()


@pytest.mark.parametrize("recompute_layers", [0, 4])
def test_one_layer_is_whole_at_a_time(alone: Ranks, recompute_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = FullySharded(alone, torch.float32, CPU)
    model, weights = build(torch.float32, recompute_layers, sharded)
    fill(sharded, weights)
    layers = [wholes(layer) for layer in model.decoder.layers.values()]
    outside = wholes(model)
    assert [len(layer) for layer in (*layers, outside)] == [8] * 5 + [2]
    counts: list[int] = []

    def count(*_: Any) -> None:
        counts.append(sum(map(is_whole, layers)))

    def contribute(gradient: Gradient, *values: Any, original: Callable[..., None] = Gradient.add_product) -> None:
        count()
        original(gradient, *values)

    for layer in model.decoder.layers.values():
        layer.mlp.register_forward_pre_hook(count)
    monkeypatch.setattr(Gradient, "add_product", contribute)
    step(model, sharded, torch.float32)
    # Of each of two micro-batches: forward passes, four products of a layer's backward pass, recomputed forward passes;
    # and the product of the head, when no layer is whole.
    assert sorted(counts) == [0] * 2 + [1] * 2 * (5 + 4 * 5 + recompute_layers)
    assert not any(map(is_whole, (*layers, outside)))
    assert all(weight.grad is None for weight in (*chain(*layers), *outside))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_weights_that_are_not_sharded(alone: Ranks, dtype: torch.dtype) -> None:
    """Whatever computes, gradients of micro-batches are added in fp32."""
    sharded, replicated = FullySharded(alone, dtype, CPU), Replicated(Ranks(), by_rows=False)
    gradients = []
    for sharing, (model, weights) in ((sharded, build(dtype, 2, sharded)), (replicated, build(dtype, 2))):
        fill(sharing, weights)
        step(model, sharing, dtype)
        gradients.append({name: sharing.gradient(weight) for name, weight in weights.items()})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
