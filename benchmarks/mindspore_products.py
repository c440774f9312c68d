"""Products of matrices on CPU: those of the MindSpore backend against MindSpore's own, by time and by memory.

Run: python benchmarks/mindspore_products.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops

from tandem.backends.mindspore.compute.cpu.products import matmul

SHAPES = [(512, 1024, 3072), (512, 3072, 1024), (1024, 1024, 4096), (2048, 1024, 4096), (64, 128, 384)]
THEIRS = {"x W^T": ops.MatMul(transpose_b=True), "g W": ops.MatMul(), "g^T x": ops.MatMul(transpose_a=True)}
OURS: dict[str, dict[str, bool]] = {"x W^T": {"transpose_b": True}, "g W": {}, "g^T x": {"transpose_a": True}}


def seconds(run: Callable[[], object], rounds: int = 7) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kept_bytes(run: Callable[[], object], calls: int = 2000) -> float:
    """Bytes of the process that each call adds."""
    for _ in range(200):
        run()
    before = _resident()
    for _ in range(calls):
        run()
    return (_resident() - before) / calls


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    random = np.random.default_rng(0)
    for tokens, inputs, outputs in SHAPES:
        shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        x, w, g = (Tensor.from_numpy(random.standard_normal(shape, np.float32)) for shape in shapes)
        operands = {"x W^T": (x, w), "g W": (g, w), "g^T x": (g, x)}
        for name, (a, b) in operands.items():
            theirs = seconds(lambda name=name, a=a, b=b: THEIRS[name](a, b).asnumpy())
            ours = seconds(lambda name=name, a=a, b=b: matmul(a, b, **OURS[name]).asnumpy())
            print(
                f"{tokens} tokens, {inputs} -> {outputs}, {name:5}: ours {1e3 * ours:7.2f} ms, "
                f"MindSpore's {1e3 * theirs:7.2f} ms, ratio {theirs / ours:.2f}"
            )
    small = Tensor.from_numpy(random.standard_normal((8, 8), np.float32))
    print(f"bytes that a call keeps: ours {kept_bytes(lambda: matmul(small, small).asnumpy()):,.0f}, ", end="")
    print(f"MindSpore's {kept_bytes(lambda: THEIRS['g W'](small, small).asnumpy()):,.0f}")


if __name__ == "__main__":
    main()
