"""Facts about this machine that need no framework."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Limits of a container's memory: cgroup version 2 and 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_USES = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))
ACCELERATOR_TOOLS = ("nvidia-smi", "npu-smi")


def memory_bytes() -> int:
    """The memory of the machine, or less where a container may use only a part of it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        if path.exists() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            sizes.append(int(text))
    return min(sizes)


def available_bytes() -> int:
    """How much memory a new allocation can get, as Linux estimates it, or what a container may still use of it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for limit, use in zip(_LIMITS, _USES):
        if limit.exists() and use.exists() and (most := limit.read_text(encoding="ascii").strip()).isdigit():
            free = min(free, max(0, int(most) - int(use.read_text(encoding="ascii"))))
    return free


def cann_version() -> str | None:
    """The version of CANN, Ascend's toolkit, that ASCEND_HOME_PATH points to; None where there is none."""
    file = Path(os.environ.get("ASCEND_HOME_PATH", "")) / "compiler" / "version.info"
    if "ASCEND_HOME_PATH" not in os.environ or not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition("=")[2].strip() for line in lines if line.startswith("Version=")), None)


def has_accelerator() -> bool:
    """Whether the tools of NVIDIA's or Ascend's drivers are installed here."""
    return any(shutil.which(tool) for tool in ACCELERATOR_TOOLS)
