"""The logger of all of Tandem, and a handler that prints what is logged, for the command line."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("tandem")

SECONDS_BETWEEN_LINES = 10.0


class _Printer(logging.Handler):
    """Prints messages unchanged: warnings and errors to standard error, all others to standard output. The streams are
    looked up for each message, since they may be redirected."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(record.getMessage(), file=stream, flush=True)  # a log file read while the run goes on must not lag


@contextmanager
def printed() -> Iterator[None]:
    """Print what is logged inside the block. Other handlers of Python's root logger do not see it."""
    if any(isinstance(handler, _Printer) for handler in log.handlers):  # an outer block prints it
        yield
        return
    printer, level, propagate = _Printer(), log.level, log.propagate
    log.addHandler(printer)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(printer)
        log.setLevel(level)
        log.propagate = propagate


def lines_of_progress(description: str, write: Callable[[str], None]) -> Callable[[int, int | None], None]:
    """A function to call with bytes done and total bytes. It writes a line every few seconds."""
    start = written = time.monotonic()

    def update(done: int, total: int | None) -> None:
        nonlocal written
        now = time.monotonic()
        if now - written < SECONDS_BETWEEN_LINES:
            return
        written = now
        of = f" of {total / 1e6:,.0f}" if total else ""
        speed = done / (now - start)
        left = f", {(total - done) / speed:,.0f} s left" if total and speed else ""
        write(f"{description}: {done / 1e6:,.0f}{of} MB, {speed / 1e6:,.0f} MB/s{left}")

    return update


def lines_of_requests(write: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """A function to call with a kind of requests, how many are done, and how many there are, as lines of progress."""
    kind, started, written, before = "", 0.0, 0.0, 0

    def update(kind_now: str, done: int, total: int) -> None:
        nonlocal kind, started, written, before
        now = time.monotonic()
        if kind_now != kind:
            kind, started, written, before = kind_now, now, now, done
        if now - written < SECONDS_BETWEEN_LINES and done < total:
            return
        written = now
        left = (now - started) / max(1, done - before) * (total - done)
        write(f"> {kind}: {done:,} of {total:,}" + (f", {left:,.0f} s left" if done < total else ""))

    return update
