"""The signals that ask a run to save and leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What people, terminals that close, and job runners send.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A terminal sends Ctrl-C to all processes, and a launcher or a script passes it on again. Both count as one.
SAME_SIGNAL_SECONDS = 1.0


@contextmanager
def stopping_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, call `handler` at each of these signals. `nohup` keeps its meaning: its SIGHUP stays ignored.

    Outside the main thread Python cannot handle signals, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in STOPPING}
    if earlier[signal.SIGHUP] is signal.SIG_IGN:
        del earlier[signal.SIGHUP]
    for number in earlier:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
