"""Standard output and standard error of a command whose result is files: the command goes on when nobody reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def open_missing_streams() -> None:
    """Open the standard streams that were closed before this program began, as `>&-` does, so that they drop all text.

    Otherwise the first file that is opened would get their number, and with it what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


@contextmanager
def lasting_console() -> Iterator[None]:
    """Inside, text that cannot be written is dropped, and so is all later text of that stream.

    A reader such as `tee` may end before the command, a terminal may be closed, and a disk may be full.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream, name) for stream, name in zip(streams, ("output", "error")))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Lasting:
    """A text stream that never fails. All else is the stream's own."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            drop_output(self._stream)
            if self._name == "output":  # standard error has nobody left to tell
                print(f"standard output is lost ({error.strerror}): this goes on without it", file=sys.stderr)


def drop_output(stream: Any) -> None:
    """From now on drop what is written to a stream, also by code that is not Python's."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
