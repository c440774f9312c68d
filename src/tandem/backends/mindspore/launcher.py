"""The command line that starts msrun. Imports no mindspore."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem.launch import run_module
from tandem.launch.machines import Machines


def launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """See `tandem.launch.supervisor.Launcher`."""
    options = {
        "--worker_num": machines.processes,
        "--local_worker_num": machines.nproc_per_node,
        "--node_rank": machines.node_rank,
        "--master_addr": machines.master_addr,
        "--master_port": machines.master_port,
        "--cluster_time_out": machines.launcher_seconds,
        "--log_dir": folder,
        "--tail_worker_log": machines.processes,  # that of no rank: a `tail` would outlive a launcher that is killed
        "--bind_core": cores(machines.nproc_per_node),
    }
    flags = [str(word) for pair in options.items() for word in pair]
    msrun = [
        sys.executable,
        *run_module.command("mindspore.parallel.cluster.run"),
        "--join=True",
    ]
    # msrun starts its workers with the first `python` on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return [*msrun, *flags, "python", *words], {"PATH": path}


def cores(ranks: int) -> str:
    """Each rank's cores, as msrun takes them; "True" lets msrun share them out, if there is one for each rank.

    Nothing else limits MindSpore's threads, which would spin on cores that other ranks need.
    """
    present = sorted(os.sched_getaffinity(0))
    if len(present) >= ranks:
        return "True"
    return json.dumps({f"device{rank}": [str(present[rank % len(present)])] for rank in range(ranks)})
