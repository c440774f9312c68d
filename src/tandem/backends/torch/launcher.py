"""How torchrun is started. Imports no torch."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem.launch.supervisor import Machines


def launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """See `tandem.launch.supervisor.Launcher`."""
    where = {
        "--nproc-per-node": machines.nproc_per_node,
        "--nnodes": machines.nnodes,
        "--node-rank": machines.node_rank,
        "--master-addr": machines.master_addr,
        "--master-port": machines.master_port,
        "--log-dir": folder,  # else it makes a folder in the temporary directory, and leaves it there
    }
    flags = [str(word) for pair in where.items() for word in pair]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *words], heap_settings()


def heap_settings() -> dict[str, str]:
    """What keeps glibc's heap free of holes where the CPU computes, as variables of the environment.

    Until 2.39 (its bug 30723) `posix_memalign`, from which PyTorch has its tensors, puts what it cuts off their ends
    into the thread's cache of small blocks. Others take such a piece and keep it; the tensor, once freed, merges with
    nothing and is too small for the next one of its size. Without that cache a process is hardly larger than what it
    holds, in about the same processor time (docs/lab/memory.md); but operators of a few numbers take a little longer,
    so it stays where devices may wait for them.
    """
    library, version = platform.libc_ver()
    is_old = library == "glibc" and tuple(map(int, version.split("."))) < (2, 39)
    has_device = shutil.which("npu-smi") or shutil.which("nvidia-smi")
    if not is_old or has_device or "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
