"""The logger that all of Tandem speaks through, and printing what it says, as the command line does."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("tandem")

SECONDS_BETWEEN_LINES = 10.0


class _Printer(logging.Handler):
    """Prints messages as they are: warnings and errors to standard error, the rest to standard output, whatever these
    are at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(record.getMessage(), file=stream, flush=True)  # a log file read while the run goes on must not lag


@contextmanager
def printed() -> Iterator[None]:
    """Print what is logged while this lasts, and pass it on to no other handler."""
    if any(isinstance(handler, _Printer) for handler in log.handlers):  # it is printed already
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
    """A function to be called with bytes done and bytes in all, which writes a line now and then."""
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
