"""`tandem plan` against training steps of several processes on PyTorch and CPU: memory and bytes sent by each stage.

Memory is measured as in plan_memory.py, of the fullest rank of a stage. Bytes are those of the collectives and messages
that a rank takes part in, counted as rings, as the plan counts them: this compares what is sent with what the formulas
say is sent, not what a network carries.

    python benchmarks/plan_parallel.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import plan_memory
import turns

from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout
from tandem.parallel.world import World
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import stage_memories
from tandem.planning.traffic import stage_traffic

MIB = 2**20

# tensor, pipeline and data size, sequence parallel, distributed optimizer, micro-batches of a step, recomputed layers
CASES = [
    (2, 1, 1, False, False, 2, 0),
    (2, 1, 1, True, False, 2, 0),
    (2, 1, 1, True, False, 2, 8),
    (1, 2, 1, False, False, 4, 0),
    (1, 1, 2, False, False, 4, 0),
    (1, 1, 2, False, True, 4, 0),
    (2, 2, 1, True, False, 4, 0),
]


def job_of(case: tuple[int, ...], layers: int, width: int, seq_length: int) -> Job:
    tensor, pipeline, data, sequence_parallel, distributed, micro_batches, recompute_layers = case
    return Job(
        config=plan_memory.model(layers, width),
        layout=Layout(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        data_parallel_size=data,
        sequence_parallel=bool(sequence_parallel),
        use_distributed_optimizer=bool(distributed),
        global_batch_size=micro_batches,
        seq_length=seq_length,
        recompute_layers=recompute_layers,
    )


def measure(job: Job) -> dict[str, float]:
    """Of this rank: its stage, bytes above the floor, and bytes sent in a step."""
    from tandem.backends import connect
    from tandem.backends.torch.communication import SentBytes

    world = World.from_environment()
    grid = Grid(job.layout, world.size)
    communicator = connect("torch", world, "cpu", 5)
    smallest = dataclasses.replace(plan_memory.SMALLEST, num_layers=job.pipeline_size)
    plan_memory.train(dataclasses.replace(job, config=smallest, seq_length=16), grid, world.rank, reset=False)
    floor = turns.resident()
    with SentBytes() as sent:
        plan_memory.train(job, grid, world.rank, reset=True)
    found = {"stage": grid.place(world.rank).pipeline, "memory": turns.peak() - floor}
    found["sent"] = sent.total / plan_memory.STEPS
    communicator.close()
    return found


def in_children(case: tuple[int, ...], size: Sequence[int], processes: int, live: bool) -> list[dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, __file__, "--case", json.dumps(case), "--size", *map(str, size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | plan_memory.allocator(live)
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    lines = [line for line in child.stdout.splitlines() if line.startswith(turns.MARK)]
    return [json.loads(line.removeprefix(turns.MARK)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(8, 512, 1024), help="layers, width and tokens")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        # One write, so that ranks' lines do not mix.
        sys.stdout.write(turns.MARK + json.dumps(measure(job_of(tuple(arguments.case), *arguments.size))) + "\n")
        sys.stdout.flush()
        return
    print(
        "TP PP DP  sequence  distributed  recomputed  stage  plan MiB  measured  live: ratio  sent MiB  counted: ratio"
    )
    for case in CASES:
        job = job_of(case, *arguments.size)
        ranks, live_ranks = (in_children(case, arguments.size, job.devices, live) for live in (False, True))
        for stage, memory in enumerate(stage_memories(job, HARDWARE["cpu"])):
            measured, live = (fullest(found, stage, "memory") for found in (ranks, live_ranks))
            traffic = stage_traffic(job, stage)
            sent = traffic.tensor + traffic.pipeline + traffic.data
            print(
                f"{case[0]:2} {case[1]:2} {case[2]:2} {case[3]!s:>9} {case[4]!s:>12} {case[6]:11} {stage:6} "
                f"{memory.peak / MIB:9.0f} {measured / MIB:9.0f} {(memory.peak - memory.retained) / live:12.2f} "
                f"{sent / MIB:9.1f} {sent / fullest(ranks, stage, 'sent'):15.3f}",
                flush=True,
            )


def fullest(ranks: list[dict[str, float]], stage: int, name: str) -> float:
    return max(rank[name] for rank in ranks if rank["stage"] == stage)


if __name__ == "__main__":
    main()
