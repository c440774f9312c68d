"""A program in a terminal of its own, as a person uses it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

SECONDS = 120.0
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """A program in a terminal of its own. `seen` is what it has written, without colours."""

    def __init__(self, words: list[str], state: Path, columns: int = 100) -> None:
        self._screen, own = pty.openpty()
        fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        self.program = subprocess.Popen(
            [sys.executable, "-m", "tandem", *words],
            stdin=own,
            stdout=own,
            stderr=own,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(own)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def wait_for(self, words: str) -> str:
        """Read until these words have come. Returns what was written up to them, and forgets it."""
        while words not in self.seen:
            assert self._read(SECONDS), f"{words!r} did not come: {self.seen!r}"
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def interrupt(self, answer: str) -> None:
        """Press Ctrl-C until something comes: Python keeps one that comes just before it reads for later."""
        self.type("\x03")
        while not self._read(5.0):
            self.type("\x03")
        self.wait_for(answer)

    def _read(self, seconds: float) -> bool:
        """Read what comes. False when nothing came for so long."""
        if not select.select([self._screen], [], [], seconds)[0]:
            return False
        try:
            new = os.read(self._screen, 65536).decode("utf-8", "replace")
        except OSError:
            new = ""
        assert new, f"the program ended: {self.seen!r}"
        self.seen += CONTROL.sub("", new)
        return True

    def end(self) -> int:
        """Wait until the program has ended; its exit code."""
        end = time.monotonic() + SECONDS
        while self.program.poll() is None:
            assert time.monotonic() < end, self.seen
            ready, _, _ = select.select([self._screen], [], [], 0.05)
            if ready:
                try:
                    os.read(self._screen, 65536)
                except OSError:
                    time.sleep(0.01)
        os.close(self._screen)
        return int(self.program.returncode)
