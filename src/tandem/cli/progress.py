"""Progress: on a terminal a bar, in a log file a plain line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tandem.logs import lines_of_progress

# called with what is done and, where it is known, how much there is
Update = Callable[[int, int | None], None]


@contextmanager
def byte_progress(description: str) -> Iterator[Update]:
    """Yields a function to be called with bytes done and bytes in all."""
    if not sys.stderr.isatty():
        yield lines_of_progress(description, lambda line: print(line, file=sys.stderr, flush=True))
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
