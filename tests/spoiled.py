"""Numbers that are not finite, on this rank alone, in one step of an engine of either backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

Where = Literal["weight", "gradient"]

# framework -> views of the values and the gradient of an engine's weight
VIEWS: dict[str, tuple[Callable[[Any, Any], np.ndarray], Callable[[Any, Any], np.ndarray]]] = {
    "torch": (
        lambda engine, weight: engine._sharing.kept(weight).numpy(),
        lambda engine, weight: engine._sharing.gradient(weight).numpy(),
    ),
    "mindspore": (
        lambda engine, weight: weight.value.asnumpy(),
        lambda engine, weight: engine._gradient(weight).asnumpy(),
    ),
}


@contextmanager
def spoiled(framework: str, engine: Any, where: Where) -> Iterator[None]:
    """One weight, or what this rank adds to its gradient, is NaN inside. It is a weight that tensor ranks replicate:
    each of them computes its gradient, and one counts it."""
    weight = next(weight for name, weight in engine._weights.items() if "pre_mlp_layernorm" in name)
    values, gradient = VIEWS[framework]
    kept = values(engine, weight).copy()

    def sum_gradients() -> None:
        gradient(engine, weight)[...] = np.nan
        type(engine)._sum_gradients(engine)

    if where == "weight":
        values(engine, weight)[...] = np.nan
    else:
        engine._sum_gradients = sum_gradients
    yield
    if where == "weight":
        values(engine, weight)[...] = kept
    else:
        del engine._sum_gradients
