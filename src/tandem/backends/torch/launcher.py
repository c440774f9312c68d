"""The command line that starts torchrun. Imports no torch."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem.launch import run_module
from tandem.launch.machines import Machines


def launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """See `tandem.launch.supervisor.Launcher`."""
    options = {
        "--nproc-per-node": machines.nproc_per_node,
        "--nnodes": machines.nnodes,
        "--node-rank": machines.node_rank,
        "--master-addr": machines.master_addr,
        "--master-port": machines.master_port,
        "--rdzv-conf": f"timeout={machines.launcher_seconds}",
        "--log-dir": folder,  # otherwise torchrun leaves a folder in the temporary directory
    }
    flags = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, *run_module.command("torch.distributed.run", *flags), *words], heap_settings()


def heap_settings() -> dict[str, str]:
    """Variables of the environment that keep glibc's heap free of holes, for runs on the CPU.

    PyTorch allocates tensors with `posix_memalign`. Before glibc 2.39 (bug 30723), it puts the ends that it cuts off
    into the thread's cache of small blocks. Other allocations then keep such a piece. When the tensor is freed, its
    memory cannot merge with the piece, and is too small for the next tensor of its size.

    Without that cache, a process is hardly larger than what it holds, in about the same processor time
    (docs/lab/memory.md). But operators on a few numbers take a little longer, so runs on devices keep the cache.
    """
    library, version = platform.libc_ver()
    is_old = library == "glibc" and tuple(map(int, version.split("."))) < (2, 39)
    has_device = shutil.which("npu-smi") or shutil.which("nvidia-smi")
    if not is_old or has_device or "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
