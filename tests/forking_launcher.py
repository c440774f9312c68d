"""A launcher that imports the framework once and forks the ranks: for tests of what ranks compute, not of launchers.

Importing a framework takes most of a toy's time. torchrun and msrun import it in themselves, in msrun's scheduler, and
in each rank.

python forking_launcher.py FRAMEWORK PROCESSES PORT WORDS...
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from tandem.launch.machines import Machines
from tandem.launch.supervisor import Launcher

HOST = "127.0.0.1"


def launcher_for(framework: str) -> Launcher:
    def launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        numbers = (str(machines.processes), str(machines.master_port))
        own = importlib.import_module(f"tandem.backends.{framework}.launcher").launcher(machines, folder, words)[1]
        return [sys.executable, __file__, framework, *numbers, *words], own

    return launcher


def torch_ranks(size: int, port: str) -> list[dict[str, str]]:
    """Each rank's variables, as torchrun sets them."""
    job = {"MASTER_ADDR": HOST, "MASTER_PORT": port, "WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": "forked"}
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def mindspore_ranks(size: int, port: str) -> list[dict[str, str]]:
    """The variables of the scheduler and of each rank, as msrun sets them."""
    job = {"MS_SCHED_HOST": HOST, "MS_SCHED_PORT": port, "MS_WORKER_NUM": str(size), "MS_TOPO_TIMEOUT": "660"}
    ranks = [
        {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank), "DEVICE_ID": str(rank)}
        for rank in range(size)
    ]
    return [{**job, **role, "RANK_SIZE": str(size)} for role in ({"MS_ROLE": "MS_SCHED"}, *ranks)]


RANKS: Mapping[str, Callable[[int, str], list[dict[str, str]]]] = {"torch": torch_ranks, "mindspore": mindspore_ranks}


def fork(act: Callable[[], object]) -> int:
    """Do something in a new process, which then ends. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    try:
        act()
        code: object = 0
    except SystemExit as ending:
        code = ending.code
    except BaseException:  # noqa: BLE001 - the interpreter would show it
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else bool(code))


def be_rank(variables: Mapping[str, str], words: Sequence[str]) -> None:
    """What `python WORDS` does with these variables."""
    os.environ.update(variables)
    if "RANK_ID" in variables:  # msrun binds ranks to cores
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(variables["RANK_ID"]) % len(cores)]})
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    framework, size, port, *words = sys.argv[1:]
    for module in ("engine", "communication"):
        importlib.import_module(f"tandem.backends.{framework}.{module}")
    pids = [fork(partial(be_rank, variables, words)) for variables in RANKS[framework](int(size), port)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids))
