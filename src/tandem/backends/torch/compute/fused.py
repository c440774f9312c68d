"""Pure functions, compiled when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch


class Fused:
    """A pure function of tensors that Inductor turns into few kernels, for tensors of any size.

    Attributes:
        function: the function, as PyTorch computes it step by step.
        kernels: how many kernels Inductor makes of it for a GPU, at most (tests/backends/test_fused.py).
    """

    def __init__(self, function: Callable[..., Any], *, kernels: int) -> None:
        self.function, self.kernels = function, kernels

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        # Here, because torch.compile imports much.
        return torch.compile(self.function, fullgraph=True, dynamic=True)

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*arguments)
