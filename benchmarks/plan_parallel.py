"""`tandem plan` against training steps of several processes on PyTorch and CPU: memory and bytes sent by each stage.

Memory is measured as in plan_memory.py, of the fullest rank of a stage, with the heap as `--nproc-per-node` sets it.
Bytes are those of the collectives and messages that a rank takes part in, counted as rings, as the plan counts them:
this compares what is sent with what the formulas say is sent, not what a network carries.

    python benchmarks/plan_parallel.py
    GLIBC_TUNABLES=glibc.malloc.arena_max=1 python benchmarks/plan_parallel.py --heap
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import plan_memory
import turns

from tandem.backends.torch.launcher import heap_settings
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout
from tandem.parallel.world import World
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import stage_memories
from tandem.planning.traffic import stage_traffic

MIB = 2**20

# What data ranks share.
NOTHING, OPTIMIZER, ALL = "nothing", "optimizer", "all"
# tensor, pipeline and data size, sequence parallel, what is shared, micro-batches of a step, recomputed layers
CASES: list[tuple[Any, ...]] = [
    (2, 1, 1, False, NOTHING, 2, 0),
    (2, 1, 1, True, NOTHING, 2, 0),
    (2, 1, 1, True, NOTHING, 2, 8),
    (1, 2, 1, False, NOTHING, 4, 0),
    (1, 1, 2, False, NOTHING, 4, 0),
    (1, 1, 2, False, OPTIMIZER, 4, 0),
    (1, 1, 2, False, ALL, 4, 0),
    (1, 1, 2, False, ALL, 4, 8),
    (1, 1, 4, False, ALL, 4, 4),
    (1, 2, 2, False, ALL, 8, 0),
    (2, 2, 1, True, NOTHING, 4, 0),
]


def job_of(case: tuple[Any, ...], layers: int, width: int, seq_length: int) -> Job:
    tensor, pipeline, data, sequence_parallel, shared, micro_batches, recompute_layers = case
    return Job(
        config=plan_memory.model(layers, width),
        layout=Layout(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        data_parallel_size=data,
        sequence_parallel=bool(sequence_parallel),
        use_distributed_optimizer=shared == OPTIMIZER,
        use_torch_fsdp2=shared == ALL,
        global_batch_size=micro_batches,
        seq_length=seq_length,
        recompute_layers=recompute_layers,
    )


def measure(job: Job) -> dict[str, float]:
    """Of this rank: its stage, bytes above the floor, bytes sent in a step, and the processor's seconds of one."""
    from tandem.backends import connect
    from tandem.backends.torch.communication import SentBytes

    world = World.from_environment()
    grid = Grid(job.layout, world.size)
    communicator = connect("torch", world, "cpu", 5)
    smallest = dataclasses.replace(plan_memory.SMALLEST, num_layers=job.pipeline_size)
    smallest_job = dataclasses.replace(job, config=smallest, seq_length=16)
    # Counted, too: what PyTorch loads for that is not the engine's.
    plan_memory.train(smallest_job, grid, world.rank, reset=False, counter=SentBytes())
    floor = turns.resident()
    sent = SentBytes()
    seconds = plan_memory.train(job, grid, world.rank, reset=True, counter=sent)
    memory = turns.peak() - floor
    communicator.close()
    return {"stage": grid.place(world.rank).pipeline, "memory": memory, "sent": sent.total, "seconds": seconds}


def in_children(case: tuple[Any, ...], size: Sequence[int], processes: int, live: bool) -> list[dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, __file__, "--case", json.dumps(case), "--size", *map(str, size)]
    heap = plan_memory.allocator(live) if live else heap_settings()
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | heap
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    lines = [line for line in child.stdout.splitlines() if line.startswith(turns.MARK)]
    return [json.loads(line.removeprefix(turns.MARK)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(8, 512, 1024), help="layers, width and tokens")
    parser.add_argument(
        "--heap", action="store_true", help="only what the heap changes: resident memory, and seconds of the processor"
    )
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        # One write, so that ranks' lines do not mix.
        sys.stdout.write(turns.MARK + json.dumps(measure(job_of(tuple(arguments.case), *arguments.size))) + "\n")
        sys.stdout.flush()
        return
    if arguments.heap:
        compare_heaps(arguments.size)
        return
    print(
        "TP PP DP  sequence       shared  recomputed  stage  plan MiB  measured  live: ratio  sent MiB  counted: ratio"
    )
    for case in CASES:
        job = job_of(case, *arguments.size)
        ranks, live_ranks = (in_children(case, arguments.size, job.devices, live) for live in (False, True))
        for stage, memory in enumerate(stage_memories(job, HARDWARE["cpu"])):
            measured, live = (fullest(found, stage, "memory") for found in (ranks, live_ranks))
            traffic = stage_traffic(job, stage)
            sent = traffic.tensor + traffic.pipeline + traffic.data
            print(
                f"{case[0]:2} {case[1]:2} {case[2]:2} {case[3]!s:>9} {case[4]:>12} {case[6]:11} {stage:6} "
                f"{memory.peak / MIB:9.0f} {measured / MIB:9.0f} {(memory.peak - memory.retained) / live:12.2f} "
                f"{sent / MIB:9.1f} {sent / fullest(ranks, stage, 'sent'):15.3f}",
                flush=True,
            )


def compare_heaps(size: Sequence[int]) -> None:
    for case in CASES:
        if case[3]:
            job = job_of(case, *size)
            ranks = in_children(case, size, job.devices, live=False)
            for stage, memory in enumerate(stage_memories(job, HARDWARE["cpu"])):
                measured, seconds = fullest(ranks, stage, "memory"), fullest(ranks, stage, "seconds")
                print(
                    f"TP {case[0]} PP {case[1]}, {case[6]} recomputed, stage {stage}: {measured / MIB:.0f} MiB, "
                    f"planned {memory.peak / measured:.2f} of it; {seconds:.2f} s",
                    flush=True,
                )


def fullest(ranks: list[dict[str, float]], stage: int, name: str) -> float:
    return max(rank[name] for rank in ranks if rank["stage"] == stage)


if __name__ == "__main__":
    main()
