"""What Inductor's Triton kernels for an NVIDIA device compute, in Triton's interpreter: no device is needed.

`TRITON_INTERPRET=1 python interpreted_kernels.py` prints, for each fused function, the largest difference from what it
gives step by step. Triton reads the variable when it is imported, so this is a process of its own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from math import isnan
from typing import Any

import pytest
import test_device_kernels
import test_fused
import torch
import triton.language as tl

# Blocks of a kernel: so small that most have several, and a reduction's loop goes round.
BLOCKS = {"XBLOCK": 4, "YBLOCK": 4, "R0_BLOCK": 8}


class Kernel:
    """A kernel of Inductor's, as `AsyncCompile.triton` gives it."""

    def __init__(self, name: str, source: str) -> None:
        namespace: dict[str, Any] = {"__name__": name, "__file__": name}
        exec(compile(source, name, "exec"), namespace)
        self.function = namespace[name]

    def run(self, *arguments: Any, stream: int) -> None:
        names = [name for name in inspect.signature(self.function.fn).parameters if name not in BLOCKS]
        blocks = {name: size for name, size in BLOCKS.items() if name in self.function.arg_names}
        given = dict(zip(names, arguments, strict=True))
        grid = [
            -(-given[f"{axis}numel"] // blocks[f"{axis.upper()}BLOCK"]) if f"{axis}numel" in given else 1
            for axis in "xy"
        ]
        self.function[tuple(grid)](*arguments, **blocks)


class Library:
    """Functions of CUDA's library, which the interpreter does not have: Triton's own of the same names."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *given: getattr(tl, name)(*given)


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor writes for a device runs here, on tensors of the CPU."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    def as_it_is(**_: Any) -> Callable[[Any], Any]:
        return lambda function: function

    for kind in ("pointwise", "reduction", "persistent_reduction"):
        monkeypatch.setattr(triton_heuristics, kind, as_it_is)
    monkeypatch.setattr(AsyncCompile, "triton", lambda self, name, source, **_: Kernel(name, source))
    monkeypatch.setattr(AsyncCompile, "wait", lambda *_: None)
    monkeypatch.setattr(triton_helpers, "libdevice", Library())
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "_DeviceGuard", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


def on_device(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def difference(function: Callable[..., Any], given: tuple[Any, ...]) -> float:
    """The largest, relative to the largest number of its result; NaN where one has NaN."""
    source = test_fused.code_of(function, lambda: tuple(map(on_device, given)))
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(source, "generated", "exec"), namespace)
    copies = [value.clone() for value in given if isinstance(value, torch.Tensor)]
    actual = namespace["call"](copies)
    expected = function(*(value.clone() if isinstance(value, torch.Tensor) else value for value in given))
    pairs = zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True)
    return max(
        (float((one.float() - other.float()).abs().max() / other.float().abs().max()) for one, other in pairs),
        key=lambda found: (isnan(found), found),
    )


def main() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        test_fused.see_hopper(monkeypatch)
        interpret(monkeypatch)
        functions = test_device_kernels.arguments()
        found = {name: difference(function, given) for name, (function, given, _) in functions.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
