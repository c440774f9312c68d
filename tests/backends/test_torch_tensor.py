"""Tensor ranks, seen from one of them: tokens and gradients travel while products are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tandem.backends.torch import tensor_parallel
from tandem.backends.torch.functional import Gradient, GradientBuffer, Weight, linear
from tandem.backends.torch.tensor_parallel import TensorParallel, entered_linear

T, N, K = 6, 5, 4


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def weights(trained: bool) -> tuple[Weight, Weight]:
    generator = torch.Generator().manual_seed(1)
    both = Weight(torch.randn(N, K, generator=generator)), Weight(torch.randn(N, generator=generator))
    for weight in both:
        weight.main_grad = GradientBuffer(weight) if trained else None
    return both


def passes(function: Callable[..., torch.Tensor], trained: bool) -> list[torch.Tensor]:
    """What the function of x, a weight and a bias gives, and all gradients."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, K, generator=generator).requires_grad_()
    both = weights(trained)
    y = function(x, *both)
    y.backward(torch.randn(T, N, generator=generator))
    assert x.grad is not None
    return [y.detach(), x.grad, *(weight.main_grad.value for weight in both if weight.main_grad is not None)]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("sequence", [True, False])
def test_an_entered_product_gives_the_bits_of_entering_and_a_product(group: Any, sequence: bool, trained: bool) -> None:
    ranks = TensorParallel(group, 0, 1, sequence, N)
    expected = passes(lambda x, *both: linear(ranks.enter(x), *both), trained)
    found = passes(lambda x, *both: entered_linear(x, *both, ranks), trained)
    assert len(found) == len(expected) == (4 if trained else 2)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("sequence", "trained", "expected"),
    [
        (True, True, ["gather", "product", "scatter", "wait for gather", "weight's gradient", "wait for scatter"]),
        (False, True, ["product", "sum", "weight's gradient", "wait for sum"]),
        (True, False, ["product", "scatter", "wait for scatter"]),
    ],
)
def test_its_backward_pass_computes_while_tensors_travel(
    group: Any, sequence: bool, trained: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Noted:
        def __init__(self, what: str, work: dist.Work) -> None:
            self._what, self._work = what, work

        def wait(self) -> None:
            events.append(f"wait for {self._what}")
            self._work.wait()

    def note(name: str, what: str) -> None:
        original = getattr(tensor_parallel, name)

        def launch(*arguments: Any) -> Any:
            events.append(what)
            result = original(*arguments)
            return result if name == "matmul" else Noted(what, result)

        monkeypatch.setattr(tensor_parallel, name, launch)

    for name, what in (("all_gather", "gather"), ("reduce_scatter", "scatter"), ("all_reduce", "sum")):
        note(name, what)
    note("matmul", "product")
    add_product = Gradient.add_product
    monkeypatch.setattr(
        Gradient, "add_product", lambda *values: events.append("weight's gradient") or add_product(*values)
    )
    passes(lambda x, *both: entered_linear(x, *both, TensorParallel(group, 0, 1, sequence, N)), trained)
    forward = ["gather", "wait for gather", "product"] if sequence else ["product"]
    assert events == [*forward, *expected]
