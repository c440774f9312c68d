"""Progress: on a terminal a bar, in a log file a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_SECONDS = 10.0  # between two plain lines

# called with what is done and, where it is known, how much there is
Update = Callable[[int, int | None], None]


@contextmanager
def byte_progress(description: str) -> Iterator[Update]:
    """Yields a function to be called with bytes done and bytes in all."""
    if not sys.stderr.isatty():
        yield _plain(description)
        return
    from rich.console import Console  # not without a terminal: importing it takes longer than small work
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(description: str) -> Update:
    start = printed = time.monotonic()

    def update(done: int, total: int | None) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= PLAIN_SECONDS:
            printed = now
            of = f" of {total / 1e6:,.0f}" if total else ""
            speed = done / (now - start)
            left = f", {(total - done) / speed:,.0f} s left" if total and speed else ""
            print(
                f"{description}: {done / 1e6:,.0f}{of} MB, {speed / 1e6:,.0f} MB/s{left}", file=sys.stderr, flush=True
            )

    return update
