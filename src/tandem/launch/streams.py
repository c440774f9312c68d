"""Standard streams of the command that starts a job, for the first rank: it reads what is typed there.

An open file goes from one process to another through a socket, whatever it is: a terminal, a pipe or a file.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tandem.launch.member import JOB
from tandem.launch.world import World

INPUT, OUTPUT, ERRORS = 0, 1, 2
_NAME = "streams"  # of the socket, in the folder of the job


@contextmanager
def lent(folder: Path, streams: Sequence[int]) -> Iterator[Callable[[], None]]:
    """Inside, the first rank of a job may take streams of this process. It gets them when the result is called.

    Args:
        folder: of the job.
        streams: INPUT, OUTPUT or ERRORS; none lends nothing.
    """
    if not streams:
        yield lambda: None
        return
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / _NAME))
        listener.listen()
        listener.setblocking(False)

        def give() -> None:
            with suppress(BlockingIOError):  # nobody has asked since the last call
                asking, _ = listener.accept()
                with asking:
                    socket.send_fds(asking, [bytes(streams)], streams)

        yield give


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
