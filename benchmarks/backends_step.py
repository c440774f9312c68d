"""One training step of the MindSpore backend against the PyTorch backend, at Qwen3-0.6B's shape, on CPU in fp32.

Both start from the same random weights and see the same tokens, so their losses must agree. `--threads` cores are
given to the processes: MindSpore counts cores, not OMP_NUM_THREADS. Whole processes take turns, because the two models
together do not fit a small machine.

    python benchmarks/backends_step.py --config config.json --seq-length 512 --threads 1
    python benchmarks/backends_step.py --config config.json --seq-length 4096 --layers 4

Targets for MindSpore's time per step: at most 1.1x PyTorch's on one thread, and 1.4x on two.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
import turns
from weights import mean_weights

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, MicroBatch
from tandem.models.hf_config import from_hf, load_hf_config


def backend(arguments: argparse.Namespace, framework: str, bf16: bool = False) -> turns.Step:
    config = from_hf(load_hf_config(arguments.config.parent))
    config = dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)
    engine = create_engine(framework, config, EngineSettings(device="cpu", bf16=bf16))
    engine.load_weights(RandomSource(config, 0))
    length = arguments.seq_length
    positions, bounds = np.arange(length, dtype=np.int32), np.array([0, length], np.int32)

    def step(number: int) -> dict[str, float]:
        tokens = np.random.default_rng(number).integers(0, config.vocab_size, length, dtype=np.int32)
        batch = MicroBatch(tokens, np.append(tokens[1:], np.int32(IGNORE)), positions, bounds)
        result = engine.train_step([batch], mean_weights([batch]), lr=1e-4, weight_decay=0.1)
        return {"tokens": length, "loss": result.loss}

    return step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a Hugging Face config.json")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--layers", type=int, help="fewer layers than the config's, on both sides")
    turns.add_arguments(parser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    sides = {name: functools.partial(backend, framework=name) for name in ("mindspore", "torch")}
    summaries = turns.run(sides, arguments)
    if summaries is None:
        return
    ours, theirs = summaries["mindspore"], summaries["torch"]
    print(f"tokens/s: {ours['rate']:.1f} against {theirs['rate']:.1f}")
    print(f"MindSpore's time per step: {theirs['rate'] / ours['rate']:.2f}x PyTorch's on {arguments.threads} thread(s)")
    print(f"peak memory: {ours['peak'] / 2**30:.2f} against {theirs['peak'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
