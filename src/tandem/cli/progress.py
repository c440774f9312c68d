"""Progress: a bar on a terminal, or a plain line every few seconds in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tandem.logs import lines_of_progress

# called with bytes done and total bytes; None when the total is not known
Update = Callable[[int, int | None], None]


@contextmanager
def byte_progress(description: str) -> Iterator[Update]:
    """Yields a function to call with bytes done and total bytes."""
    if not sys.stderr.isatty():
        yield lines_of_progress(description, lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.console import Console  # only for a terminal: the import may take longer than the work
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
