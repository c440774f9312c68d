"""The processes of a job: what the launcher says of them, and how they talk about anything but tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among those that the launcher started. `local_rank` counts within its machine.

    The scheduler of msrun has rank -1.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def leads(self, *, shared_storage: bool) -> bool:
        """Whether this process does what is done once per disk."""
        return self.rank == self.first_on_disk(shared_storage=shared_storage)

    def first_on_disk(self, *, shared_storage: bool) -> int:
        """The first rank that writes to this process's disk. A machine's ranks follow each other."""
        return 0 if shared_storage else self.rank - self.local_rank

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """As torchrun or msrun says it; a single process without either.

        Raises:
            UserError: several processes are announced, but not which of them this one is.
        """
        if (
            environment.get("MS_ROLE") == "MS_SCHED"
        ):  # msrun's process beside the ranks, which lets them find each other
            return cls(size=int(environment["MS_WORKER_NUM"]))
        for size, rank, local_rank in VARIABLES:
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


def is_scheduler(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that msrun starts beside the ranks, which only lets them find each other."""
    return environment.get("MS_ROLE") == "MS_SCHED"


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process together with others that it computes with."""
    return any(environment.get(size, "1") != "1" for size, *_ in VARIABLES) and not is_scheduler(environment)


class Communicator(Protocol):
    """All processes of a job. Every method is called by every process, in the same order."""

    world: World

    def barrier(self) -> None:
        """Return when every process has arrived."""
        ...

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; values are what JSON can hold."""
        ...

    def close(self) -> None:
        """Leave the job in order, when all have finished."""
        ...


class SingleProcess:
    """The `Communicator` of a job of one process."""

    world = World()

    def barrier(self) -> None:
        pass

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass
