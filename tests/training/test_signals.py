"""Which signals ask a run to stop, and what they do before it has begun."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import pytest

from tandem.errors import RunStopped
from tandem.launch.stopping import STOPPING, handled, kept_handler
from tandem.training.signals import StopSignals


def wait_for(signals: StopSignals) -> None:
    deadline = time.monotonic() + 10
    while signals.received is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noticed_and_ends_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        wait_for(signals)
    assert signals.received == number.name
    assert signal.getsignal(number) == before


def test_nohup_keeps_its_meaning() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(signals)
        assert signals.received == "SIGUSR1"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_first_step_a_run_leaves_at_once() -> None:
    def begin(signals: StopSignals) -> None:
        with signals.leaving_at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with StopSignals() as signals, pytest.raises(RunStopped, match="SIGTERM before the first step"):
        begin(signals)


def test_a_signal_that_came_before_is_not_lost() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(signals)
        with pytest.raises(RunStopped), signals.leaving_at_once():
            raise AssertionError("not reached")


def test_a_library_in_a_thread_takes_no_handler_away() -> None:
    """MindSpore does this where a server opens its model. Python itself could not undo it there."""
    heard = []

    def library() -> None:
        with kept_handler(signal.SIGUSR1):
            ctypes.CDLL(None).signal(int(signal.SIGUSR1), ctypes.c_void_p(1))  # SIG_IGN

    with handled({signal.SIGUSR1: lambda number, frame: heard.append(number)}):
        thread = threading.Thread(target=library)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == [signal.SIGUSR1]
