"""SIGTERM and SIGINT during a run: they are noticed at once, and the run acts on them between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from tandem.logs import log

STOPPING = (signal.SIGTERM, signal.SIGINT)
# A terminal sends Ctrl-C to all processes, and the launcher passes it on again. Both count as one Ctrl-C.
SAME_CTRL_C_SECONDS = 1.0


class StopSignals:
    """Remembers the first SIGTERM or SIGINT that arrives inside the block `with StopSignals() as signals:`.

    A second SIGINT ends the process at once with code 130, even while it computes or waits for another rank. So a
    thread reads the signals: Python's own handlers wait for the next instruction of the main thread. Outside the main
    thread Python cannot handle signals, and this class does nothing.

    Attributes:
        received: name of the signal; None when there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._earlier_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._earlier_handlers = {number: signal.signal(number, _do_nothing) for number in STOPPING}
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_fd)
        os.close(self._write)  # the thread then reads the end of the pipe, and ends

    def _watch(self, read: int) -> None:
        first_time = 0.0
        while number := os.read(read, 1):
            if number[0] not in STOPPING:
                continue
            if self.received is None:
                first_time = time.monotonic()
                self.received = signal.Signals(number[0]).name
                log.warning("%s: saving and leaving after this step", self.received)
            elif number[0] == signal.SIGINT and time.monotonic() - first_time > SAME_CTRL_C_SECONDS:
                os._exit(128 + signal.SIGINT)
        os.close(read)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A signal handler. Without one, the signal would end the process."""
