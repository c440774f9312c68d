"""`tandem plan`'s memory against training steps on CPU, one process.

Each case trains two steps in a process of its own. Measured is the largest resident memory, less that of the process
when its framework is loaded and an engine of the smallest model has taken a step. `live` is the same run with every
block of 128 KiB and more returned to the system at once (`MALLOC_MMAP_THRESHOLD_`): what the engine holds, without the
holes that glibc's heap keeps. The plan counts `live` and a heap's 64 MiB of retained memory.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --framework mindspore
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager

import numpy as np
import turns
from weights import mean_weights

from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.views import Adapted
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.published import qwen3_config
from tandem.parallel.grid import Grid
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import peak_memory

MIB = 2**20
STEPS = 2
VOCABULARY = 16384  # so that the state leaves room for activations in 3 GB
SMALLEST = dataclasses.replace(
    qwen3_config("0.6B"), num_layers=1, hidden_size=64, ffn_hidden_size=64, num_attention_heads=8, vocab_size=64
)


def model(layers: int, width: int) -> ModelConfig:
    """Qwen3-0.6B with fewer layers and all its widths in proportion."""
    published = qwen3_config("0.6B")
    return dataclasses.replace(
        published,
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=published.ffn_hidden_size * width // published.hidden_size,
        kv_channels=published.kv_channels * width // published.hidden_size,
        vocab_size=VOCABULARY,
    )


# layers, width, tokens of a sequence, sequences of a micro-batch, micro-batches, recomputed layers, rank of adapters
CASES = [
    (8, 512, 1024, 1, 1, 0, 0),
    (8, 512, 2048, 1, 1, 0, 0),
    (8, 512, 2048, 1, 1, 8, 0),
    (8, 512, 1024, 2, 2, 0, 0),
    (8, 512, 4096, 1, 1, 8, 0),
    (5, 1024, 512, 1, 1, 0, 0),
    (5, 1024, 1024, 1, 1, 0, 0),
    (5, 1024, 1024, 1, 1, 5, 0),
    (5, 1024, 2048, 1, 1, 3, 0),
    (2, 2048, 1024, 1, 1, 0, 0),
    (8, 512, 2048, 1, 1, 0, 16),
    (8, 512, 1024, 2, 2, 0, 16),
    (5, 1024, 1024, 1, 1, 0, 16),
    (5, 1024, 1024, 1, 1, 5, 16),
]


def job_of(case: tuple[int, ...], framework: str) -> Job:
    layers, width, seq_length, samples, micro_batches, recompute_layers, rank = case
    return Job(
        config=dataclasses.replace(model(layers, width), lora=Lora(r=rank) if rank else None),
        seq_length=seq_length,
        micro_batch_size=samples,
        global_batch_size=samples * micro_batches,
        recompute_layers=recompute_layers,
        ai_framework=framework,
    )


def measure(job: Job) -> float:
    """Bytes above the floor, in this process."""
    train(dataclasses.replace(job, config=SMALLEST, seq_length=16, recompute_layers=0), Grid(), 0, reset=False)
    floor = turns.resident()
    train(job, Grid(), 0, reset=True)
    return turns.peak() - floor


def train(
    job: Job, grid: Grid, rank: int, *, reset: bool, counter: AbstractContextManager[object] | None = None
) -> float:
    """Some steps of one rank. With `reset`, the peak is measured from the moment when the weights are loaded.

    With `counter`, a step inside that context comes first. It is not measured, because counting may keep memory.

    Returns:
        The processor's seconds of the quickest step.
    """
    from tandem.backends import create_engine
    from tandem.backends.interface import EngineSettings
    from tandem.data.batch import Sample, collate

    settings = EngineSettings(
        device="cpu",
        recompute_layers=job.recompute_layers,
        grid=grid,
        rank=rank,
        sequence_parallel=job.sequence_parallel,
        use_distributed_optimizer=job.use_distributed_optimizer,
        use_torch_fsdp2=job.use_torch_fsdp2,
    )
    engine = create_engine(job.ai_framework, job.config, settings)
    engine.load_weights(source_of(job.config))
    tokens = np.arange(job.seq_length, dtype=np.int32)
    words = tokens % job.config.vocab_size
    samples = [Sample(words, words, tokens, (job.seq_length,))] * job.micro_batch_size
    batches = [collate(samples)] * job.micro_batches
    weights = mean_weights(batches)
    if counter is not None:
        with counter:
            engine.train_step(batches, weights, 1e-4, 0.1)
    if reset:
        turns.reset_peak()
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        engine.train_step(batches, weights, 1e-4, 0.1)
        seconds.append(time.process_time() - start)
    return min(seconds)


def allocator(live: bool) -> dict[str, str]:
    """The environment in which resident memory is live memory."""
    return {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"} if live else {}


def source_of(config: ModelConfig) -> TensorSource:
    """Random weights, and new adapters where the model has some."""
    weights = RandomSource(config.without_adapters, 0)
    return weights if config.lora is None else Adapted(FreshAdapters(weights, config, 0), weights, weights)


def in_child(case: tuple[int, ...], framework: str, live: bool) -> float:
    command = [sys.executable, __file__, "--framework", framework, "--case", json.dumps(case)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | allocator(live))
    return float(child.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", default="torch", choices=("torch", "mindspore"))
    parser.add_argument("--first", type=int, default=0, help="begin with this case, from 0; adapters are from 10 on")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(measure(job_of(tuple(arguments.case), arguments.framework)))
        return
    print("layers width  tokens  micro-batches  recomputed  rank  plan MiB  measured  ratio      live  ratio")
    for case in CASES[arguments.first :]:
        layers, width, seq_length, samples, micro_batches, recompute_layers, rank = case
        hardware, job = HARDWARE["cpu"], job_of(case, arguments.framework)
        plan = peak_memory(job, hardware)
        batch = f"{samples} x {seq_length:4} {micro_batches:14}"
        line = f"{layers:6} {width:5} {batch} {recompute_layers:11} {rank:5} {plan / MIB:9.0f}"
        for live in (False, True):
            measured = in_child(case, arguments.framework, live)
            planned = plan - (hardware.retained if live else 0)
            line += f" {measured / MIB:9.0f} {planned / measured:6.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
