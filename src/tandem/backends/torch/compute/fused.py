"""Pure functions, compiled when they are first called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from tandem.backends.torch.device import lacking_to_compile
from tandem.logs import log

_THREAD = threading.local()
MOST_VERSIONS = 64  # of one function: dtypes, and sizes of 1, are compiled each for itself


class Fused:
    """A pure function of tensors that Inductor turns into few kernels, for tensors of any size.

    Attributes:
        function: the function, as PyTorch computes it step by step.
        kernels: how many kernels Inductor makes of it for a GPU, at most (tests/backends/test_fused.py).
    """

    def __init__(self, function: Callable[..., Any], *, kernels: int) -> None:
        self.function, self.kernels = function, kernels
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        # Plain tensors: some versions refuse subclasses with attributes, or weights whose gradient has another dtype.
        plain = [argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        if self._compiled is None:
            self._compiled = self._compile(plain[0].device)
        if not getattr(_THREAD, "allows_versions", False):
            _allow_versions()
        return self._compiled(*plain)

    def _compile(self, device: torch.device) -> Callable[..., Any]:
        if lacking := lacking_to_compile(device):
            _say(f"each step takes longer, as its kernels cannot be compiled: {lacking}")
            return self.function
        return torch.compile(self.function, fullgraph=True, dynamic=True)


def _allow_versions() -> None:
    """Let this thread compile `MOST_VERSIONS` of a function. With fullgraph, one more than the limit is an error.

    PyTorch keeps the limit for each thread, and passes backward have threads of their own.
    """
    config = import_module("torch._dynamo.config")  # here, as it imports much
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the older name
    setattr(config, limit, max(getattr(config, limit), MOST_VERSIONS))
    _THREAD.allows_versions = True


@cache
def _say(text: str) -> None:
    """Warn, once."""
    log.warning("> %s", text)
