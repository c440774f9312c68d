"""Threads in the place of ranks, for what ranks do together without tensors."""

from __future__ import annotations

import threading
from typing import Any

from tandem.launch.world import World


class Room:
    """Threads that talk as ranks do."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.gate = threading.Barrier(size, timeout=20)

    def communicator(self, rank: int, per_machine: int) -> Communicator:
        """Of one rank; so many consecutive ones are on one machine."""
        return Communicator(self, World(rank, len(self.values), rank % per_machine))


class Communicator:
    def __init__(self, room: Room, world: World) -> None:
        self.world, self._room = world, room

    def barrier(self) -> None:
        self.all_gather(None)

    def all_gather(self, value: Any) -> list[Any]:
        self._room.gate.wait()
        self._room.values[self.world.rank] = value
        self._room.gate.wait()
        return list(self._room.values)

    def close(self) -> None:
        pass
