"""How many processes a job has, and on which machines."""

from __future__ import annotations

import errno
import math
import random
import socket
from contextlib import suppress
from dataclasses import dataclass, replace

from tandem.errors import UserError

DEFAULT_PORT = 29500
PORTS = range(20_000, 32_768)  # Linux takes larger ones for outgoing connections: some start before the ranks do


@dataclass(frozen=True, kw_only=True)
class Machines:
    """How many processes to start on how many machines, and which machine this is. The names are torchrun's.

    Attributes:
        master_port: None means a free port for one machine, and DEFAULT_PORT for several.
        timeout_minutes: how long machines wait for each other at the start.

    >>> Machines(nproc_per_node=8, nnodes=2, node_rank=1).ranks
    range(8, 16)
    """

    nproc_per_node: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    timeout_minutes: float = 10

    @property
    def processes(self) -> int:
        return self.nproc_per_node * self.nnodes

    @property
    def ranks(self) -> range:
        """The ranks on this machine."""
        return range(self.node_rank * self.nproc_per_node, (self.node_rank + 1) * self.nproc_per_node)

    @property
    def launcher_seconds(self) -> int:
        """How long the framework's launcher waits: longer than the supervisor, which says what is wrong."""
        return math.ceil(60 * self.timeout_minutes) + 60

    @property
    def meeting_place(self) -> str:
        return f"{self.master_addr}:{self.master_port}"

    def checked(self) -> Machines:
        """The same machines, with a port.

        Raises:
            UserError: a number is out of range, or the first machine cannot open the port at its address.
        """
        if self.nproc_per_node < 1 or self.nnodes < 1 or not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                f"--nproc-per-node {self.nproc_per_node} --nnodes {self.nnodes} --node-rank {self.node_rank}: expected "
                f"positive numbers, and --node-rank from 0 to --nnodes - 1"
            )
        port = self.master_port
        if port is None:
            port = free_port(self.master_addr) if self.nnodes == 1 else DEFAULT_PORT
        if self.node_rank == 0:
            check_port(self.master_addr, port)
        return replace(self, master_port=port)


def free_port(address: str) -> int:
    """A port that nothing uses and that Linux gives to no outgoing connection until the ranks open it."""
    for port in random.sample(PORTS, 100):
        with suppress(OSError):
            _bind(address, port)
            return port
    return PORTS[0]  # what is wrong with the address, `check_port` says


def check_port(address: str, port: int) -> None:
    """Raise UserError when the port cannot be opened at this address."""
    try:
        _bind(address, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--master-port {port} on {address} is in use: end the other job, or give another port"
            ) from None
        raise UserError(
            f"--master-addr {address}: expected an address of this machine, since it has --node-rank 0 ({error})"
        ) from None


def _bind(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
