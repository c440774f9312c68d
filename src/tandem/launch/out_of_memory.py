"""How many processes Linux has killed because memory ran out: near this process, or else on the whole machine."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def kills(cgroups: Path = CGROUPS, proc: Path = PROC) -> int | None:
    """The number of kills so far in this process's control group, and in those below it; None where nobody counts.

    Without a count of the group, that of the machine.
    """
    counts = (_count(path) for path in [*_group_files(cgroups, proc), proc / "vmstat"])
    return next((count for count in counts if count is not None), None)


def _group_files(cgroups: Path, proc: Path) -> list[Path]:
    """Files that may hold the count of the group: of version 2 and of version 1, by its path and in a container."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            roots, name = [cgroups, cgroups / "unified"], "memory.events"
        elif "memory" in controllers.split(","):
            roots, name = [cgroups / "memory"], "memory.oom_control"
        else:
            continue
        files += [folder / name for root in roots for folder in (root / path.lstrip("/"), root)]
    return files


def _count(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(value) for name, value in map(str.split, lines) if name == "oom_kill"), None)
