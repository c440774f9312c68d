"""What a pass waits for is asked for before the pass that comes first: messages of stages, and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_toys import compute_with, run_step_by_step
from toy_work import mean_weights, toy_batch, toy_weights

from tandem.backends.interface import EngineSettings
from tandem.backends.passes import WeightedBatch
from tandem.backends.torch import engine as engine_module
from tandem.backends.torch.communication import Groups, Ranks
from tandem.backends.torch.compute import cuda, sets
from tandem.backends.torch.engine import TorchEngine
from tandem.backends.torch.pipeline import Pipeline
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout
from tandem.parallel.pipeline import Link
from toys import toy_config

CONFIG = toy_config(num_layers=6)
MICRO_BATCHES = 4


class Alone(Pipeline):
    """A stage whose neighbours send ones at once."""

    def note(self, what: str, link: Link, forward: bool) -> None:
        self.events.append(f"{what} {'activations' if forward else 'gradients'} of {link.stage}")

    def expect(self, link: Link, forward: bool, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.note("expect", link, forward)

        def arrived() -> torch.Tensor:
            self.note("wait for", link, forward)
            return x.fill_(1.0)

        return arrived

    def send(self, link: Link, forward: bool, x: torch.Tensor) -> None:
        pass


def middle_stage(monkeypatch: pytest.MonkeyPatch, vpp: int | None) -> tuple[TorchEngine, list[str]]:
    """The second of three stages, and what it does."""
    none = Ranks()
    groups = Groups(none, none, none, none, none, none, {})
    monkeypatch.setattr(engine_module, "make_groups", lambda *_, **__: groups)
    monkeypatch.setattr(engine_module, "Pipeline", Alone)
    layout = Layout(pipeline_model_parallel_size=3, num_layers_per_virtual_pipeline_stage=vpp)
    engine = TorchEngine(CONFIG, EngineSettings(device="cpu", grid=Grid(layout, 3), rank=1))
    engine.load_weights(toy_weights(CONFIG))
    events: list[str] = []
    engine._passes.pipeline.events = events  # type: ignore[attr-defined]
    for chunk in engine._passes.chunks:
        chunk.register_forward_pre_hook(lambda *_: events.append("forward pass"))
    begin = engine._passes._backward

    def backward(*arguments: Any) -> None:
        events.append("backward pass")
        begin(*arguments)

    object.__setattr__(engine._passes, "_backward", backward)
    return engine, events


def accumulate(engine: TorchEngine, micro_batches: int) -> None:
    batches = [toy_batch(CONFIG, (5, 3 + number), seed=number) for number in range(micro_batches)]
    engine._accumulate([WeightedBatch.of(*pair, 0) for pair in zip(batches, mean_weights(batches))])


def test_messages_are_expected_one_pass_early(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, events = middle_stage(monkeypatch, None)
    accumulate(engine, MICRO_BATCHES)
    forward = ["wait for activations of 0", "forward pass"]
    backward = ["wait for gradients of 2", "backward pass"]
    more, less = ["expect activations of 0"], ["expect gradients of 2"]
    # F0 F1 B0 F2 B1 F3 B2 B3: before each pass stands what the next one needs.
    assert events == [
        *(*more, *more, *forward, *less, *forward, *more, *backward, *less, *forward, *more, *backward),
        *(*less, *forward, *less, *backward, *backward),
    ]


def test_interleaved_stages_expect_each_message_before_the_pass_before_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, events = middle_stage(monkeypatch, 1)
    sizes: list[int] = []
    new = engine._passes._new_hidden
    object.__setattr__(engine._passes, "_new_hidden", lambda tokens: sizes.append(tokens) or new(tokens))
    accumulate(engine, 6)
    expected = [place for place, event in enumerate(events) if event.startswith("expect")]
    waits = [place for place, event in enumerate(events) if event.startswith("wait")]
    passes = [place for place, event in enumerate(events) if event.endswith("pass")]
    assert len(expected) == len(waits) == len(passes) == 2 * 2 * 6
    assert sorted(sizes) == sorted(8 + number for number in range(6) for _ in range(4))  # as many as in its batch
    for number in range(1, len(passes)):
        assert expected[number] < passes[number - 1] < waits[number]


@pytest.mark.parametrize("vpp", [None, 1])
def test_each_micro_batch_is_copied_once_and_one_pass_early(vpp: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NVIDIA's kernels. Chunks of interleaved stages share the copy."""
    run_step_by_step(monkeypatch)
    compute_with(monkeypatch, sets.CUDA)
    copied: list[int] = []

    def begin(copy: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
        tensors = copy()
        events.append(f"copy {len(copied)}")
        copied.append(len(tensors[0]))
        return lambda: tensors

    monkeypatch.setattr(cuda, "copy_stream", lambda device: SimpleNamespace(begin=begin))
    engine, events = middle_stage(monkeypatch, vpp)
    accumulate(engine, 6)
    assert copied == [8 + number for number in range(6)]
    if vpp is None:
        steps = [event for event in events if event.startswith("copy") or event.endswith("pass")]
        assert steps[:5] == ["copy 0", "copy 1", "forward pass", "forward pass", "copy 2"]


def test_a_copy_runs_on_its_own_stream_and_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    computing = SimpleNamespace(wait_event=lambda event: events.append(f"computing waits for {event}"))
    stream = SimpleNamespace(record_event=lambda: events.append("recorded") or "the copy")

    @contextmanager
    def on(chosen: object) -> Any:
        assert chosen is stream
        events.append("on the stream")
        yield
        events.append("off the stream")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    tensor = SimpleNamespace(record_stream=lambda used: events.append("kept for computing" * (used is computing)))
    arrived = cuda.CopyStream(torch.device("cuda")).begin(lambda: events.append("copy") or [tensor])  # type: ignore
    assert events == ["on the stream", "copy", "off the stream", "recorded"]
    assert arrived() == [tensor]
    assert events[4:] == ["computing waits for the copy", "kept for computing"]
