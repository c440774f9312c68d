"""`tandem plan` against training steps of several processes on CPU: memory and, on PyTorch, bytes sent by each stage.

Memory is measured as in plan_memory.py, of the fullest rank of a stage, with the heap as `--nproc-per-node` sets it.
Bytes are those of the collectives and messages that a rank takes part in, counted as rings, as the plan counts them:
this compares what is sent with what the formulas say is sent, not what a network carries.

    python benchmarks/plan_parallel.py
    python benchmarks/plan_parallel.py --framework mindspore
    GLIBC_TUNABLES=glibc.malloc.arena_max=1 python benchmarks/plan_parallel.py --heap
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plan_memory
import turns

from tandem.backends import launcher_of, serve_as_scheduler
from tandem.frameworks import named_framework
from tandem.launch.machines import Machines
from tandem.launch.member import exit_with
from tandem.launch.world import World, is_scheduler
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout
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


def job_of(framework: str, case: tuple[Any, ...], layers: int, width: int, seq_length: int) -> Job:
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
        ai_framework=framework,
    )


def measure(job: Job, folder: Path) -> None:
    """Leave in a file of this rank: its stage, bytes above the floor, bytes sent in a step (None where they are not
    counted), and the processor's seconds of one."""
    from tandem.backends import connect

    world = World.from_environment()
    grid = Grid(job.layout, world.size)
    communicator = connect(job.ai_framework, world, "cpu", 5)
    smallest = dataclasses.replace(plan_memory.SMALLEST, num_layers=job.pipeline_size)
    smallest_job = dataclasses.replace(job, config=smallest, seq_length=16)
    # Counted, too: what PyTorch loads for that is not the engine's.
    plan_memory.train(smallest_job, grid, world.rank, reset=False, counter=counter_of(job.ai_framework))
    floor = turns.resident()
    counter = counter_of(job.ai_framework)
    seconds = plan_memory.train(job, grid, world.rank, reset=True, counter=counter)
    memory = turns.peak() - floor
    sent = None if counter is None else counter.total
    figures = {"stage": grid.place(world.rank).pipeline, "memory": memory, "sent": sent, "seconds": seconds}
    (folder / f"{world.rank}.json").write_text(json.dumps(figures))
    communicator.close()


def counter_of(framework: str) -> Any:
    """What counts bytes that are sent; None where nothing does."""
    if framework != "torch":
        return None
    from tandem.backends.torch.communication import SentBytes

    return SentBytes()


def in_children(framework: str, case: tuple[Any, ...], size: Sequence[int], live: bool) -> list[dict[str, Any]]:
    """What `measure` found in each rank."""
    processes = job_of(framework, case, *size).devices
    with tempfile.TemporaryDirectory() as folder:
        words = [__file__, "--framework", framework, "--case", json.dumps(case), "--size", *map(str, size)]
        machines = Machines(nproc_per_node=processes).checked()
        command, environment = launcher_of(framework)(machines, Path(folder), [*words, "--output", folder])
        heap = {**plan_memory.allocator(live), "GLIBC_TUNABLES": ""} if live else {}
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment | heap
        job = subprocess.run(command, check=False, env=variables, stdout=subprocess.DEVNULL)  # msrun tells its commands
        files = [Path(folder, f"{rank}.json") for rank in range(processes)]
        if not all(file.exists() for file in files):  # MindSpore's threads may crash when all has been written
            job.check_returncode()
        return [json.loads(file.read_text()) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(8, 512, 1024), help="layers, width and tokens")
    parser.add_argument(
        "--heap", action="store_true", help="only what the heap changes: resident memory, and seconds of the processor"
    )
    parser.add_argument("--framework", choices=("torch", "mindspore"), default="torch")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if is_scheduler():
        serve_as_scheduler()
    if arguments.case:
        measure(job_of(arguments.framework, tuple(arguments.case), *arguments.size), arguments.output)
        return
    if arguments.heap:
        compare_heaps(arguments.size)
        return
    print(
        "TP PP DP  sequence       shared  recomputed  stage  plan MiB  measured  live: ratio  sent MiB  counted: ratio"
    )
    framework = arguments.framework
    for case in CASES:
        if case[4] == ALL and not named_framework(framework).shards_weights:
            continue
        job = job_of(framework, case, *arguments.size)
        ranks, live_ranks = (in_children(framework, case, arguments.size, live) for live in (False, True))
        for stage, memory in enumerate(stage_memories(job, HARDWARE["cpu"])):
            measured, live = (fullest(of_ranks, stage, "memory") for of_ranks in (ranks, live_ranks))
            traffic = stage_traffic(job, stage)
            sent = traffic.tensor + traffic.pipeline + traffic.data
            counted = f"{sent / fullest(ranks, stage, 'sent'):15.3f}" if framework == "torch" else ""
            print(
                f"{case[0]:2} {case[1]:2} {case[2]:2} {case[3]!s:>9} {case[4]:>12} {case[6]:11} {stage:6} "
                f"{memory.peak / MIB:9.0f} {measured / MIB:9.0f} {(memory.peak - memory.retained) / live:12.2f} "
                f"{sent / MIB:9.1f} {counted}",
                flush=True,
            )


def compare_heaps(size: Sequence[int]) -> None:
    for case in CASES:
        if case[3]:
            job = job_of("torch", case, *size)
            ranks = in_children("torch", case, size, live=False)
            for stage, memory in enumerate(stage_memories(job, HARDWARE["cpu"])):
                measured, seconds = fullest(ranks, stage, "memory"), fullest(ranks, stage, "seconds")
                print(
                    f"TP {case[0]} PP {case[1]}, {case[6]} recomputed, stage {stage}: {measured / MIB:.0f} MiB, "
                    f"planned {memory.peak / measured:.2f} of it; {seconds:.2f} s",
                    flush=True,
                )


def fullest(ranks: list[dict[str, Any]], stage: int, name: str) -> float:
    return float(max(rank[name] for rank in ranks if rank["stage"] == stage))


if __name__ == "__main__":
    exit_with(main)
