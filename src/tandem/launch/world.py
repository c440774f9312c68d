"""The processes of a job: their numbers from the launcher, and how they exchange values other than tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tandem.errors import UserError


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the job.

    >>> World.from_environment({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"})
    World(rank=3, size=4, local_rank=1)

    Attributes:
        rank: number of this process; -1 for the scheduler of msrun.
        size: number of processes.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def leads(self, *, shared_storage: bool) -> bool:
        """Whether this process does the work that is done once for each disk."""
        return self.rank == self.first_on_disk(shared_storage=shared_storage)

    def first_on_disk(self, *, shared_storage: bool) -> int:
        """The first rank that writes to the disk of this process. The ranks of a machine are consecutive."""
        return 0 if shared_storage else self.rank - self.local_rank

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """From the variables that torchrun or msrun sets; a single process without them.

        Raises:
            UserError: the variables name several processes, but not the rank of this one.
        """
        if is_scheduler(environment):
            return cls(rank=-1, size=int(environment["MS_WORKER_NUM"]))
        for size, rank, local_rank in _variables(environment):
            if environment.get(size, "1") != "1":
                names = (rank, size, local_rank)
                if missing := [name for name in names if not environment.get(name, "").isdigit()]:
                    raise UserError(
                        f"{size}={environment[size]}, but {' and '.join(missing)} is not set to a number: start the "
                        f"processes with torchrun, msrun, or --nproc-per-node"
                    )
                return cls(*(int(environment[name]) for name in names))
        return cls()


# world size, rank, rank on the machine: torchrun's variables, and msrun's
VARIABLES = (("WORLD_SIZE", "RANK", "LOCAL_RANK"), ("MS_WORKER_NUM", "RANK_ID", "DEVICE_ID"))
TORCHRUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it for the processes that it starts
MSRUN = (b"msrun", b"mindspore.parallel.cluster.run")  # how it is called
# Other variables that launchers, and job runners for them, set.
OTHER_VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_NODE_ID", "MS_TOPO_TIMEOUT", "RANK_SIZE", "RANK_TABLE_FILE"),
)
OTHER_PREFIXES = ("TORCHELASTIC_", "PET_", "ROLE_")  # torchrun reads its own flags from PET_*


def forget_launchers(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove every variable from which a process would take its place in a job.

    DEVICE_ID stays: alone, it chooses the device of a process.
    """
    names = {name for variables in VARIABLES for name in variables if name != "DEVICE_ID"} | set(OTHER_VARIABLES)
    for name in [name for name in environment if name in names or name.startswith(OTHER_PREFIXES)]:
        del environment[name]


def started_processes(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of processes of the job that this one was started for; None without a complete set of variables.

    A job runner's own variables, or some that are left over, are seldom complete.
    """
    for names in _variables(environment):
        if all(environment.get(name, "").isdigit() for name in names):
            return int(environment[names[0]])
    return None


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or msrun has certainly started this process, whatever else the variables say."""
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:  # not Linux
        parent = []
    return TORCHRUN in environment or any(word.rpartition(b"/")[2] in MSRUN for word in parent)


def is_scheduler(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is msrun's extra process, which only helps the ranks find each other."""
    return environment.get("MS_ROLE") == "MS_SCHED" and TORCHRUN not in environment


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process computes together with other processes."""
    return any(environment.get(size, "1") != "1" for size, *_ in VARIABLES) and not is_scheduler(environment)


def _variables(environment: Mapping[str, str]) -> Sequence[tuple[str, str, str]]:
    """VARIABLES, the launcher's own first: a job runner may have set WORLD_SIZE for a process that msrun started."""
    return VARIABLES[::-1] if "MS_ROLE" in environment and TORCHRUN not in environment else VARIABLES


class Communicator(Protocol):
    """Exchange between all processes of a job. Every process must call the same methods in the same order."""

    world: World

    def barrier(self) -> None:
        """Wait until every process has called this."""
        ...

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank. Values must be valid in JSON."""
        ...

    def close(self) -> None:
        """Leave the job after all processes have finished."""
        ...


class SingleProcess:
    """The `Communicator` of a job with one process."""

    world = World()

    def barrier(self) -> None:
        pass

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass
