"""SIGTERM and SIGINT while a run goes on: noticed at once, acted upon between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from tandem.logs import log

STOPPING = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on the Ctrl-C that its terminal has sent to the whole job: that is one Ctrl-C, not two.
SAME_CTRL_C_SECONDS = 1.0


class StopSignals:
    """Remembers the first SIGTERM or SIGINT that arrives between `with StopSignals() as signals:` and its end.

    A second SIGINT ends the process at once, with code 130, even where it computes or waits for another rank: signals
    are read by a thread, because Python's own handlers wait for the main thread's next instruction. Outside the main
    thread, where Python handles no signals, nothing is noticed.

    Attributes:
        received: the signal's name; None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _handled_by_the_thread) for number in STOPPING}
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._write)  # the thread reads the end of the pipe, and ends

    def _watch(self, read: int) -> None:
        first = 0.0
        while number := os.read(read, 1):
            if number[0] not in STOPPING:
                continue
            if self.received is None:
                first = time.monotonic()
                self.received = signal.Signals(number[0]).name
                log.warning("%s: saving and leaving after this step", self.received)
            elif number[0] == signal.SIGINT and time.monotonic() - first > SAME_CTRL_C_SECONDS:
                os._exit(128 + signal.SIGINT)
        os.close(read)


def _handled_by_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler must be there, or the signal would end the process."""
