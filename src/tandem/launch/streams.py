"""Standard streams of the command that starts a job, for the first rank: it reads what is typed there.

An open file goes from one process to another through a socket, whatever it is: a terminal, a pipe or a file.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tandem.launch.member import JOB
from tandem.launch.world import World

INPUT, OUTPUT, ERRORS = 0, 1, 2
_NAME = "streams"  # of the socket, in the folder of the job


class Lent:
    """Streams of this process that the first rank of a job may take. Leaving it as a context ends that.

    Args:
        folder: of the job.
        streams: INPUT, OUTPUT or ERRORS; none lends nothing.
    """

    def __init__(self, folder: Path, streams: Sequence[int]) -> None:
        self._streams = streams
        self._listener = socket.socket(socket.AF_UNIX) if streams else None
        if self._listener is not None:
            self._listener.bind(str(folder / _NAME))
            self._listener.listen()
            self._listener.setblocking(False)

    def give(self) -> None:
        """Hand them over, if they were asked for since the last call."""
        if self._listener is None:
            return
        try:
            asking, _ = self._listener.accept()
        except BlockingIOError:
            return
        with asking:
            socket.send_fds(asking, [bytes(self._streams)], self._streams)

    def __enter__(self) -> Lent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()


def take_streams() -> None:
    """On the first rank of a job, have the streams that are lent to it as its own. Elsewhere, nothing changes."""
    path = Path(os.environ.get(JOB, "")) / _NAME
    if JOB not in os.environ or World.from_environment().rank != 0 or not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(path))
        numbers, files, _, _ = socket.recv_fds(asking, ERRORS + 1, ERRORS + 1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number, file in zip(numbers, files):
        os.dup2(file, number)
        os.close(file)
