"""One training step of the PyTorch backend in bf16 against fp32, at Qwen3-0.6B's shape, on a CPU that has bfloat16.

Both start from the same random weights and see the same tokens. Whole processes take turns.

    python benchmarks/bf16_step.py --config config.json --seq-length 512 --layers 8 --threads 2
"""

from __future__ import annotations

import argparse
import functools
import os

import torch
import turns
from backends_step import add_arguments, backend

from tandem.backends.torch.device import has_native_bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    if not has_native_bf16(torch.device("cpu")):
        parser.error("this CPU has no bfloat16: /proc/cpuinfo names neither avx512_bf16 nor amx_bf16")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    sides = {name: functools.partial(backend, framework="torch", bf16=name == "bf16") for name in ("bf16", "fp32")}
    summaries = turns.run(sides, arguments)
    if summaries is None:
        return
    ours, theirs = summaries["bf16"], summaries["fp32"]
    print(f"tokens/s: {ours['rate']:.1f} against {theirs['rate']:.1f}: {ours['rate'] / theirs['rate']:.2f}x")
    print(f"peak memory: {ours['peak'] / 2**30:.2f} against {theirs['peak'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
