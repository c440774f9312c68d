"""Signals that ask a run to stop: they are noticed at once, and the run acts on them between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from tandem.errors import RunStopped
from tandem.launch.stopping import SAME_SIGNAL_SECONDS, STOPPING, stopping_signals
from tandem.logs import log


class StopSignals:
    """Remembers the first of STOPPING that arrives inside the block `with StopSignals() as signals:`.

    A second SIGINT ends the process at once with code 130, even while it computes or waits for another rank. So a
    thread reads the signals: Python's own handlers wait for the next instruction of the main thread. Outside the main
    thread Python cannot handle signals, and this class does nothing.

    Attributes:
        received: name of the signal; None when there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._nothing_to_save = False

    def __enter__(self) -> StopSignals:
        self._stack = ExitStack()
        if threading.current_thread() is not threading.main_thread():
            return self
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._stack.callback(os.close, write)  # the thread then reads the end of the pipe, and ends
        self._stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
        self._stack.enter_context(stopping_signals(self._handle))
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Inside, a signal ends the block with RunStopped: nothing is trained yet, so nothing would be saved."""
        self._nothing_to_save = True
        try:
            self._leave_if_received()
            yield
        finally:
            self._nothing_to_save = False

    def _leave_if_received(self) -> None:
        if self.received is not None:
            raise RunStopped(f"stopped by {self.received} before the first step; the same command starts again")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Called in the main thread, when it comes to its next instruction."""
        if self._nothing_to_save:
            self._nothing_to_save = False  # a second signal must not disturb the clean-up
            self.received = self.received or signal.Signals(number).name
            self._leave_if_received()

    def _watch(self, read: int) -> None:
        first_time = 0.0
        while number := os.read(read, 1):
            if number[0] not in STOPPING:
                continue
            if not first_time:
                first_time = time.monotonic()
                self.received = signal.Signals(number[0]).name
                what = "leaving" if self._nothing_to_save else "saving and leaving after this step"
                log.warning("%s: %s", self.received, what)
            elif number[0] == signal.SIGINT and time.monotonic() - first_time > SAME_SIGNAL_SECONDS:
                os._exit(128 + signal.SIGINT)
        os.close(read)
