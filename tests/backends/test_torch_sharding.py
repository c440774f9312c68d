"""Fully sharded weights are whole only while their layer computes (F: `--use-torch-fsdp2`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference import toy_batch

from tandem.backends.torch.communication import Ranks
from tandem.backends.torch.fully_sharded import FullySharded, Unit
from tandem.backends.torch.model import Build, Chunk, GPTModel, own_weights, prepare
from toys import toy_config

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    """A group of one process: everything is gathered and freed as among many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Ranks(dist.group.WORLD, 0, 1)
    dist.destroy_process_group()


def whole(layer: torch.nn.Module) -> bool:
    sizes = {weight.untyped_storage().nbytes() > 0 for weight in own_weights(layer).values()}
    assert len(sizes) == 1, "weights of a layer come and go together"
    return sizes.pop()


@pytest.mark.parametrize("recompute_layers", [0, 4])
def test_at_most_two_layers_are_whole_at_a_time(
    alone: Ranks, recompute_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(num_layers=5)
    sharded = FullySharded(alone)
    model = GPTModel(
        Build(config, torch.float32, CPU, None, sharded), Chunk(tuple(range(5)), True, True), recompute_layers
    )
    sharded.prepare(list(own_weights(model).values()), training=True)
    for weight in own_weights(model).values():
        torch.nn.init.normal_(sharded.kept(weight), std=0.1)
    layers = list(model.decoder.layers.values())
    counts = []

    def count(*_: Any) -> None:
        counts.append(sum(map(whole, layers)))

    def make_gradients(unit: Unit, original: Callable[[Unit], None] = Unit.make_gradients) -> None:
        original(unit)
        count()

    for layer in layers:
        layer.register_forward_pre_hook(count)
    monkeypatch.setattr(Unit, "make_gradients", make_gradients)  # where a backward pass begins
    assert not any(map(whole, layers))
    sharded.begin(gradients=True)
    hidden = model(prepare(config, toy_batch(config, (9, 4)), torch.float32, CPU, None), None)
    assert not any(map(whole, layers))
    hidden.backward(torch.ones_like(hidden))
    sharded.end()
    sharded.reduce()
    assert not any(map(whole, (*layers, model)))
    assert max(counts) == 2, counts
    assert len(counts) == 5 + 1 + 5 + recompute_layers  # forward passes, outside layers, backward passes, recomputed
    assert all(weight.main_grad is None for weight in own_weights(model).values())
    assert all(sharded.gradient(weight).abs().sum() > 0 for weight in own_weights(layers[0]).values())
