"""How msrun is started. Imports no mindspore."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem.parallel.launch import Machines


def launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """See `tandem.parallel.launch.Launcher`.

    Each rank gets cores of its own: nothing else limits MindSpore's threads.
    """
    where = {
        "--worker_num": machines.processes,
        "--local_worker_num": machines.nproc_per_node,
        "--node_rank": machines.node_rank,
        "--master_addr": machines.master_addr,
        "--master_port": machines.master_port,
        "--log_dir": folder,
    }
    flags = [str(word) for pair in where.items() for word in pair]
    msrun = [sys.executable, "-m", "mindspore.parallel.cluster.run", "--join=True", "--bind_core=True"]
    # It starts its workers with the first `python` on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return [*msrun, *flags, "python", *words], {"PATH": path}
