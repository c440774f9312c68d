"""A weight with the buffer its gradient accumulates in, and the shape of every differentiable function here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

# From the gradient of a function's value to the gradient of its input. Calling it adds the gradients of the weights
# that the function used. It may be called once, and leaves its argument unchanged.
Pullback = Callable[[Tensor], Tensor]


@dataclass
class Weight:
    """One tensor of the model, with its gradient.

    Attributes:
        value: what the model computes with.
        master: what the optimizer updates, fp32: `value` itself, unless that is smaller, or other ranks update some of
            its rows; then this rank's rows.
        gradient: fp32, same shape, or None before the first backward pass. It is kept from step to step, so that no
            activation takes its place in the memory pool.
        has_gradient: `gradient` holds something of this step.
    """

    value: Tensor
    master: Tensor
    gradient: Tensor | None = None
    has_gradient: bool = False

    def add_gradient(self, value: Tensor) -> None:
        """Accumulate; the first value of a step becomes the buffer itself, which spares a pass over memory."""
        value = value.astype(ms.float32)
        self.gradient = self.gradient + value if self.has_gradient else value
        self.has_gradient = True

    def gradient_rows(self) -> np.ndarray:
        """On CPU, the buffer to write to; its contents are undefined where there is no gradient yet."""
        if self.gradient is None:
            self.gradient, _ = empty(*self.value.shape)
        return self.gradient.asnumpy()

    def refresh(self) -> None:
        """Bring `value` up to date with a master of all its rows."""
        if self.value is not self.master:
            self.value.copy_(self.master.astype(self.value.dtype))


def empty(*shape: int, dtype: ms.Type = ms.float32) -> tuple[Tensor, np.ndarray]:
    """A tensor in CPU memory, with undefined contents, and a view to write them through.

    MindSpore's memory pool hands out pages that are already mapped; NumPy would fault them in again every time.
    """
    tensor = mint.empty(shape, dtype=dtype)
    return tensor, tensor.asnumpy()


def single(values: np.ndarray) -> np.ndarray:
    """The same in fp32, to compute with: itself, or a copy of fp16."""
    return values.astype(np.float32, copy=False)


@contextmanager
def written_in_single(values: np.ndarray) -> Iterator[np.ndarray]:
    """What to compute `values` in, in fp32: itself, or for fp16 an array that is rounded once, at the end."""
    results = values if values.dtype == np.float32 else np.empty(values.shape, np.float32)
    yield results
    if results is not values:
        values[...] = results
