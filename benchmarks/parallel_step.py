"""One training step on two processes of one thread each against one process of two threads: PyTorch on CPU, fp32.

Layouts take turns with the single process. All start from the same random weights and see the same tokens, so their
losses must agree. Each layout also counts the bytes that its first rank sends in a step, against `tandem plan`'s
formula, and the bytes of Adam's moments that this rank keeps.

    python benchmarks/parallel_step.py
    MALLOC_MMAP_THRESHOLD_=131072 MALLOC_TRIM_THRESHOLD_=131072 python benchmarks/parallel_step.py \
        --layers 24 --hidden-size 256 --vocab-size 2048 --seq-length 64

The second keeps freed memory from staying with the process, so that its peaks are those of live memory.

Target: bytes within 5 % of the formula's. The ratio of tokens/s is what communication costs on this machine.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import functools
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import turns
from weights import mean_weights

from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.models.published import qwen3_config
from tandem.parallel.layout import Layout
from tandem.planning.job import Job
from tandem.planning.traffic import stage_traffic

MICRO_BATCHES = 4  # of a step, over all data ranks


@dataclasses.dataclass(frozen=True)
class Spread:
    """A way to train on some processes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    use_torch_fsdp2: bool = False

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> Layout:
        return Layout(tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp)


ALONE = "alone"
SPREADS = {
    ALONE: Spread(),
    "tp2": Spread(tp=2),
    "tp2-sp": Spread(tp=2, sequence_parallel=True),
    "pp2": Spread(pp=2),
    "dp2": Spread(dp=2),
    "dp2-sharded": Spread(dp=2, use_distributed_optimizer=True),
    "fsdp2": Spread(dp=2, use_distributed_optimizer=True, use_torch_fsdp2=True),
}


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    width = arguments.hidden_size
    return dataclasses.replace(
        qwen3_config("0.6B"),
        num_layers=arguments.layers,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        kv_channels=width // 8,
        vocab_size=arguments.vocab_size,
    )


def one_rank(arguments: argparse.Namespace, spread: Spread) -> turns.Step:
    """This process's share of a step; its first rank starts the others."""
    import torch

    from tandem.backends import connect, create_engine
    from tandem.backends.interface import EngineSettings
    from tandem.backends.torch.communication import SentBytes
    from tandem.launch.world import World
    from tandem.parallel.grid import Grid

    torch.set_num_threads(max(1, arguments.threads // spread.processes))
    start_peers(spread.processes)
    world = World.from_environment()
    atexit.register(connect("torch", world, "cpu", timeout_minutes=5).close)
    grid = Grid(spread.layout, world.size)
    floor = turns.resident()
    config = model_config(arguments)
    engine = create_engine(
        "torch",
        config,
        EngineSettings(
            device="cpu",
            grid=grid,
            rank=world.rank,
            sequence_parallel=spread.sequence_parallel,
            use_distributed_optimizer=spread.use_distributed_optimizer,
            use_torch_fsdp2=spread.use_torch_fsdp2,
        ),
    )
    engine.load_weights(RandomSource(config, 0))
    share = slice(grid.place(world.rank).data, None, grid.data_size)
    sent = SentBytes()

    def step(number: int) -> dict[str, float]:
        batches = [micro_batch(number * MICRO_BATCHES + k, arguments, config) for k in range(MICRO_BATCHES)]
        # Counting slows a step, and the first is not measured.
        with sent if number == 0 else nullcontext():
            result = engine.train_step(batches[share], mean_weights(batches)[share], lr=1e-4, weight_decay=0.1)
        moments = sum(array.nbytes for kind, _, array in engine.tensors() if kind in ("exp_avg", "exp_avg_sq"))
        tokens = MICRO_BATCHES * arguments.seq_length
        return {"tokens": tokens, "loss": result.loss, "sent": sent.total, "moments": moments, "floor": floor}

    return step


def start_peers(processes: int) -> None:
    """In the process that has no rank yet: become the first, and start the others as torchrun would."""
    if processes == 1 or "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    for rank in range(1, processes):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        subprocess.Popen([sys.executable, *sys.argv], stdout=subprocess.DEVNULL, env=environment)


def micro_batch(seed: int, arguments: argparse.Namespace, config: ModelConfig) -> MicroBatch:
    length = arguments.seq_length
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, length + 1, dtype=np.int32)
    return MicroBatch(tokens[:-1], tokens[1:], np.arange(length, dtype=np.int32), np.array([0, length], np.int32))


def formula_bytes(arguments: argparse.Namespace, spread: Spread) -> float:
    """What `tandem plan` says that the first rank sends."""
    job = Job(
        config=model_config(arguments),
        layout=spread.layout,
        data_parallel_size=spread.dp,
        sequence_parallel=spread.sequence_parallel,
        use_distributed_optimizer=spread.use_distributed_optimizer,
        use_torch_fsdp2=spread.use_torch_fsdp2,
        global_batch_size=MICRO_BATCHES,
        seq_length=arguments.seq_length,
    )
    traffic = stage_traffic(job, stage=0)
    return traffic.tensor + traffic.pipeline + traffic.data


def held(summary: dict[str, Any]) -> float:
    """The peak of the first rank's memory, above what it held before it had a model."""
    return summary["peak"] - summary["last"]["floor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=list(SPREADS)[1:], default=list(SPREADS)[1:])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=1024, help="the rest of the shape is Qwen3-0.6B's, in scale")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=512)
    turns.add_arguments(parser)
    arguments = parser.parse_args()
    names = [ALONE, *arguments.layouts]
    summaries = turns.run({name: functools.partial(one_rank, spread=SPREADS[name]) for name in names}, arguments)
    if summaries is None:
        return
    alone = summaries[ALONE]
    for name in arguments.layouts:
        summary, sent = summaries[name], summaries[name]["last"]["sent"]
        print(
            f"{name:>12}: {summary['rate'] / alone['rate']:.2f}x the tokens/s; sends {sent / 2**20:.1f} MiB a step, "
            f"{sent / formula_bytes(arguments, SPREADS[name]):.3f}x the formula's; moments "
            f"{summary['last']['moments'] / alone['last']['moments']:.2f}x; peak {held(summary) / held(alone):.2f}x"
        )


if __name__ == "__main__":
    main()
