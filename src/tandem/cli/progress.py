"""Progress on a terminal as a bar, in a log file as a few plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

PLAIN_SECONDS = 10.0  # between two plain lines


@contextmanager
def byte_progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields a function to be called with the number of bytes just done."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda amount: bar.advance(task, amount)
    else:
        yield _plain(description, total)


def _plain(description: str, total: int | None) -> Callable[[int], None]:
    done, printed, start = 0, time.monotonic(), time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, printed
        done += amount
        now = time.monotonic()
        if now - printed >= PLAIN_SECONDS:
            printed = now
            of = f" of {total / 1e6:,.0f}" if total else ""
            speed = done / 1e6 / (now - start)
            print(f"{description}: {done / 1e6:,.0f}{of} MB, {speed:,.0f} MB/s", file=sys.stderr, flush=True)

    return advance
