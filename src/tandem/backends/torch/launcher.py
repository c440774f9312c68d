"""How torchrun is started. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tandem.parallel.launch import Machines


def launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """See `tandem.parallel.launch.Launcher`."""
    where = {
        "--nproc-per-node": machines.nproc_per_node,
        "--nnodes": machines.nnodes,
        "--node-rank": machines.node_rank,
        "--master-addr": machines.master_addr,
        "--master-port": machines.master_port,
        "--log-dir": folder,  # else it makes a folder in the temporary directory, and leaves it there
    }
    flags = [str(word) for pair in where.items() for word in pair]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *words], {}
