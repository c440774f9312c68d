"""When data ranks communicate, seen from one of them: with --overlap-grad-reduce and --overlap-param-gather."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from toy_work import mean_gradients, mean_step, snapshot, toy_batch, toy_weights

from tandem.backends.interface import EngineSettings
from tandem.backends.torch import data_parallel, overlap
from tandem.backends.torch import engine as engine_module
from tandem.backends.torch.communication import Groups, Ranks
from tandem.backends.torch.engine import TorchEngine
from tandem.backends.torch.functional import Gradient
from tandem.backends.torch.overlap import Bundle, InOrder
from toys import TOYS

BATCHES = 2


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Data ranks of which there is one: collectives are launched as among many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    one, none = Ranks(dist.group.WORLD, 0, 1), Ranks()
    groups = Groups(none, none, one, none, none, one, {})
    monkeypatch.setattr(engine_module, "make_groups", lambda *_, **__: groups)
    yield
    dist.destroy_process_group()


def part(name: str) -> str:
    """Where a weight is: a layer, or the first word of its name."""
    found = re.match(r"decoder\.layers\.\d+", name)
    return found.group() if found else name.split(".")[0]


class Recorded:
    """What an engine does, in order: ("backward", part), ("sum", part), ("gather", part), ("wait", part)..."""

    def __init__(self, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self._weights = engine._weights
        names = {id(weight.main_grad): name for name, weight in self._weights.items()}  # type: ignore[attr-defined]
        contribute = Gradient.add_product

        def noted(gradient: Gradient, *values: Any) -> None:
            self.events.append(("backward", part(names[id(gradient)])))
            contribute(gradient, *values)

        monkeypatch.setattr(Gradient, "add_product", noted)
        for what, order in (("sum", engine._sharing._sums), ("gather", engine._sharing._gathers)):  # type: ignore[attr-defined]
            monkeypatch.setattr(order, "_start", self._recorder(what, order._start))
        for chunk in engine._passes.chunks:
            for number, layer in chunk.decoder.layers.items():
                layer.self_attention.register_forward_pre_hook(
                    lambda *_, number=number: self.events.append(("forward", f"decoder.layers.{number}"))
                )

    def _recorder(self, what: str, start: Callable[..., Any]) -> Callable[..., Any]:
        names = {id(weight): name for name, weight in self._weights.items()}

        def launch(bundle: Bundle) -> Callable[[], None]:
            name = part(names[id(bundle[0])])  # the final norm's and the head's are one
            self.events.append((what, name))
            wait_for_it = start(bundle)

            def wait() -> None:
                self.events.append((f"wait for {what}", name))
                wait_for_it()

            return wait

        return launch

    def take(self) -> list[tuple[str, str]]:
        """The events since the last call; the same one many times in a row is one."""
        events, self.events = self.events, []
        return [event for event, _ in groupby(events)]


def engine_of(toy: str, **settings: Any) -> TorchEngine:
    engine = TorchEngine(TOYS[toy], EngineSettings(device="cpu", **settings))
    engine.load_weights(toy_weights(TOYS[toy]))
    return engine


def batches(toy: str) -> list[Any]:
    return [toy_batch(TOYS[toy], (5, 3), seed=seed) for seed in range(BATCHES)]


@pytest.mark.parametrize("recompute_layers", [0, 2])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_layers_gradients_leave_before_the_layer_before_it_computes(
    alone: None, sharded: bool, recompute_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = "qwen3-untied"
    engine = engine_of(
        toy, overlap_grad_reduce=True, use_distributed_optimizer=sharded, recompute_layers=recompute_layers
    )
    recorded = Recorded(engine, monkeypatch)
    mean_gradients(engine, batches(toy))
    events = [event for event in recorded.take() if event[0] in ("backward", "sum")]
    layers = [f"decoder.layers.{number}" for number in (2, 1, 0)]
    # The untied head's gradient comes with the loss. Nothing leaves in the first micro-batch.
    first = [("backward", "output_layer"), *(("backward", layer) for layer in layers)]
    last = [("backward", "output_layer"), ("sum", "decoder")]
    last += [event for layer in layers for event in (("backward", layer), ("sum", layer))]
    assert events == [*first, *last, ("sum", "embedding")]


def test_without_the_flag_gradients_leave_after_all_passes(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("qwen3-untied")
    recorded = Recorded(engine, monkeypatch)
    mean_gradients(engine, batches("qwen3-untied"))
    kinds = [kind for kind, _ in groupby(kind for kind, _ in recorded.take() if kind in ("backward", "sum"))]
    assert kinds == ["backward", "sum"]


def test_new_weights_are_awaited_when_their_layer_computes(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = "qwen3-untied"
    settings = {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
    engine = engine_of(toy, overlap_param_gather=True, **settings)
    recorded = Recorded(engine, monkeypatch)
    mean_step(engine, batches(toy), 1e-2, 0.1)
    of_gathers = [event for event in recorded.take() if "gather" in event[0]]
    parts = ["embedding", *(f"decoder.layers.{number}" for number in range(3)), "decoder"]
    assert of_gathers == [("gather", name) for name in parts]  # and none was awaited
    engine.evaluate(batches(toy)[:1])
    waits = [event for event in recorded.take() if event[0] in ("forward", "wait for gather")]
    layers = [(kind, name) for name in parts[1:4] for kind in ("wait for gather", "forward")]
    assert waits == [("wait for gather", "embedding"), *layers, ("wait for gather", "decoder")]


def test_weights_are_whole_when_they_are_read(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = "qwen3-tied"
    engine = engine_of(toy, use_distributed_optimizer=True, overlap_param_gather=True)
    recorded = Recorded(engine, monkeypatch)
    mean_step(engine, batches(toy), 1e-2, 0.1)
    gathers = recorded.take()
    assert "wait for gather" not in dict(gathers)
    snapshot(engine)
    assert {name for kind, name in recorded.take() if kind == "wait for gather"} == {
        name for kind, name in gathers if kind == "gather"
    }


@pytest.mark.parametrize("meanwhile", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("small", "messages"),
    [
        (2**20, 5),  # of embedding, three layers, final norm with head
        (1000, 1 + 3 * (4 + 1) + 2),  # four matrices of a layer by themselves, its norms together
    ],
)
def test_small_weights_of_a_layer_share_a_collective(
    alone: None, small: int, messages: int, sharded: bool, meanwhile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "SMALL", small)
    toy = "qwen3-untied"
    flags = {"overlap_grad_reduce": meanwhile, "overlap_param_gather": meanwhile}
    engine = engine_of(toy, use_distributed_optimizer=sharded, **flags)
    calls: Counter[str] = Counter()
    for name in ("reduce_scatter", "all_reduce", "all_gather"):
        collective = getattr(data_parallel, name)
        monkeypatch.setattr(data_parallel, name, partial(counted, calls, name, collective))
    mean_step(engine, batches(toy), 1e-2, 0.1)
    assert calls == ({"reduce_scatter": messages, "all_gather": messages} if sharded else {"all_reduce": messages})


def counted(calls: Counter[str], name: str, collective: Callable[..., Any], *arguments: Any) -> Any:
    calls[name] += 1
    return collective(*arguments)


@pytest.mark.parametrize("small", [2**20, 1000])
@pytest.mark.parametrize("toy", ["qwen3-tied", "qwen3-moe"])
def test_bits_are_those_of_one_process(alone: None, toy: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "SMALL", small)
    meanwhile = engine_of(toy, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    after = engine_of(toy)
    for _ in range(2):
        assert mean_step(meanwhile, batches(toy), 1e-2, 0.1) == mean_step(after, batches(toy), 1e-2, 0.1)
    expected = {(kind, shard.spec.name): array.copy() for kind, shard, array in after.tensors()}
    for kind, shard, array in meanwhile.tensors():
        np.testing.assert_array_equal(array, expected[kind, shard.spec.name])


def test_groups_start_in_one_order_whatever_the_order_they_are_ready_in() -> None:
    started, done = [], []
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    numbers = {id(weight): number for number, weight in enumerate(weights)}

    def start(bundle: Bundle) -> Callable[[], None]:
        (weight,) = bundle
        started.append(numbers[id(weight)])
        return lambda: done.append(numbers[id(weight)])

    order = InOrder(start, [[weights[:1]], [], [weights[1:2], weights[2:3]], [weights[3:]]], most=2)
    order.ready(2)
    assert started == []
    order.ready(0)
    assert started == [0]
    order.ready(1)  # which is empty
    assert (started, done) == ([0, 1, 2], [])
    order.start_rest()
    assert (started, done) == ([0, 1, 2, 3], [0])  # at most two are under way
    order.settle()
    assert done == [0, 1, 2, 3]
    order.start_rest()
    assert started == [0, 1, 2, 3] * 2
