"""A weight with its gradient buffer, and the type of every pullback here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.memory import undefined

# From the gradient of a function's value to the gradient of its input. Calling it adds the gradients of the weights
# that the function used. It may be called once, and leaves its argument unchanged.
Pullback = Callable[[Tensor], Tensor]


@dataclass
class Weight:
    """One tensor of the model, with its gradient.

    Attributes:
        value: what the model computes with.
        master: what the optimizer updates, fp32: `value`, if that is fp32 and this rank updates all its rows; otherwise
            a tensor with this rank's rows.
        gradient: fp32, same shape, or None before the first backward pass. It is kept from step to step, so that no
            activation takes its place in the memory pool.
        has_gradient: whether `gradient` holds something of this step.
        trained: whether it has a gradient at all.
    """

    value: Tensor
    master: Tensor
    gradient: Tensor | None = None
    has_gradient: bool = False
    trained: bool = True

    def add_gradient(self, value: Tensor) -> None:
        """Accumulate. The first value of a step becomes the buffer, which saves a pass over memory."""
        if not self.trained:
            return
        value = value.astype(ms.float32)
        self.gradient = self.gradient + value if self.has_gradient else value
        self.has_gradient = True

    def gradient_rows(self) -> np.ndarray:
        """On CPU, the buffer to write to. Its content is undefined when there is no gradient yet."""
        if self.gradient is None:
            self.gradient, _ = empty(*self.value.shape)
        return self.gradient.asnumpy()

    def refresh(self) -> None:
        """Update `value` from a master that has all its rows."""
        if self.value is not self.master:
            self.value.copy_(self.master)


def empty(*shape: int, dtype: ms.Type = ms.float32) -> tuple[Tensor, np.ndarray]:
    """A tensor in CPU memory, with undefined contents, and a view to write them through.

    MindSpore's memory pool reuses pages that are already mapped. NumPy's memory would be mapped again every time.
    """
    tensor = undefined(shape, dtype)
    return tensor, tensor.asnumpy()


def single(values: np.ndarray) -> np.ndarray:
    """The same values in fp32: the array itself, or, for fp16, a copy."""
    return values.astype(np.float32, copy=False)


@contextmanager
def written_in_single(values: np.ndarray) -> Iterator[np.ndarray]:
    """An fp32 array for the results that `values` shall hold: itself, or, for fp16, one that is rounded at the end."""
    results = values if values.dtype == np.float32 else np.empty(values.shape, np.float32)
    yield results
    if results is not values:
        values[...] = results
