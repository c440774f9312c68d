"""Handlers of signals, above all of those that ask a run to save and leave."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

# What people, terminals that close, and job runners send.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A terminal sends Ctrl-C to all processes, and a launcher or a script passes it on again. Both count as one.
SAME_SIGNAL_SECONDS = 1.0

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def stopping_signals(handler: Handler) -> Iterator[None]:
    """Inside, call `handler` at each of these signals. `nohup` keeps its meaning: its SIGHUP stays ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with handled({number: handler for number in STOPPING if number != signal.SIGHUP or not ignored}):
        yield


@contextmanager
def handled(handlers: Mapping[int, Handler | signal.Handlers]) -> Iterator[None]:
    """Inside, these signals have these handlers.

    Outside the main thread Python cannot handle signals, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextmanager
def kept_handler(number: signal.Signals) -> Iterator[None]:
    """Inside, a library may install a handler of its own for a signal. Afterwards the one from before is back.

    Other threads than the main one may use this, too: unlike Python's `signal.signal`, the system lets them.
    """
    system, before = ctypes.CDLL(None), ctypes.create_string_buffer(1024)  # more than any `struct sigaction` has
    system.sigaction(int(number), None, before)
    try:
        yield
    finally:
        system.sigaction(int(number), before, None)
