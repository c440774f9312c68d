"""`events.jsonl`: starts, saves, exports and ends of a run. A resumed run adds to the file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.files.jsonl import append_line, read_json_lines, remove_damaged
from tandem.training.progress import Progress

EVENTS_FILE = "events.jsonl"
IDENTITY = ("event", str)  # what every line has


class EventLog:
    """Appends a JSON object with the time for each event. Damaged lines of the file are removed first.

    Args:
        folder: of the run; None writes nothing. Only the first rank writes.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / EVENTS_FILE if folder else None
        if self._path:
            remove_damaged(self._path, *IDENTITY)

    def add(self, event: str, **values: Any) -> None:
        if self._path is None:
            return
        line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **values}
        with FileIO(self._path, "a") as file:
            append_line(file, line)

    @contextmanager
    def around(self, progress: Progress) -> Iterator[None]:
        """Record the start of the run, and its end: finished, or stopped by an error."""
        self.add("started", iteration=progress.iteration)
        try:
            yield
        except BaseException as error:
            with suppress(UserError):  # if the disk is full, the user must still see the first error
                self.add("stopped", iteration=progress.iteration, reason=f"{type(error).__name__}: {error}")
            raise
        self.add("finished", iteration=progress.iteration)


def read_events(folder: str | Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; empty when there is no file."""
    path = Path(folder) / EVENTS_FILE
    return read_json_lines(path, *IDENTITY) if path.exists() else []
