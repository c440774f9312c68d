"""Time one training step of the MindSpore backend against the PyTorch backend, at the shape of a real model.

Each backend lives in a child process with the given cores; the children take steps in turn, so that whatever else the
machine does hits both alike. Prints the median time per step, the peak memory, and the ratios.

    python benchmarks/backends_step.py --config config.json --seq-length 512 --steps 5 --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

FRAMEWORKS = ("torch", "mindspore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("/work/shared/data/qwen3-0.6b/config.json"))
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of the one document of a step")
    parser.add_argument("--layers", type=int, help="use fewer layers than the config has")
    parser.add_argument("--recompute-layers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--frameworks", nargs="+", default=FRAMEWORKS, choices=FRAMEWORKS)
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipes = {}
    for framework in options.frameworks:
        pipes[framework], far_end = context.Pipe()
        context.Process(target=child, args=(framework, options, far_end), daemon=True).start()
    for framework, pipe in pipes.items():
        print(f"{framework:>10}: ready, first step {pipe.recv():.2f} s", flush=True)

    times: dict[str, list[float]] = {framework: [] for framework in pipes}
    for _ in range(options.steps):
        for framework, pipe in pipes.items():
            pipe.send("step")
            times[framework].append(pipe.recv())
    for framework, pipe in pipes.items():
        pipe.send("stop")
        loss, peak = pipe.recv()
        median = statistics.median(times[framework])
        print(
            f"{framework:>10}: median {median:.3f} s per step, {options.seq_length / median:.1f} tokens/s "
            f"(from {min(times[framework]):.3f} to {max(times[framework]):.3f}), "
            f"peak {peak:.2f} GiB, loss {loss:.5f}"
        )
    if len(times) == 2:
        ratios = [mindspore / torch for torch, mindspore in zip(times["torch"], times["mindspore"])]
        print(f"mindspore / torch: {statistics.median(ratios):.3f} (median of {len(ratios)} rounds)")


def child(framework: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Build an engine, then take a step whenever told to."""
    # Both frameworks size their thread pools by these, when they are first imported.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import numpy as np

    from tandem.backends import create_engine
    from tandem.backends.interface import EngineSettings
    from tandem.checkpoints.random_init import RandomSource
    from tandem.data.batch import MicroBatch
    from tandem.models.config import from_hf, load_hf_config

    config = from_hf(load_hf_config(options.config.parent))
    config = dataclasses.replace(config, num_layers=options.layers or config.num_layers)
    settings = EngineSettings(device="cpu", recompute_layers=options.recompute_layers)
    engine = create_engine(framework, config, settings)
    engine.load_weights(RandomSource(config, seed=0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, options.seq_length + 1, dtype=np.int32)
    positions = np.arange(options.seq_length, dtype=np.int32)
    batch = MicroBatch(tokens[:-1], tokens[1:], positions, np.array([0, options.seq_length], np.int32))

    def step() -> float:
        nonlocal loss
        start = time.perf_counter()
        loss = engine.train_step([batch], lr=1e-4, weight_decay=0.1).loss
        return time.perf_counter() - start

    loss = 0.0
    pipe.send(step())
    while pipe.recv() == "step":
        pipe.send(step())
    pipe.send((loss, peak_memory()))


def peak_memory() -> float:
    """GiB that this process has held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


if __name__ == "__main__":
    main()
