"""Standard input for a command that runs as several processes: the first one gets what is typed here."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

INPUT, IS_TYPED = "TANDEM_INPUT", "TANDEM_INPUT_IS_TYPED"  # variables for the processes of the job


@contextmanager
def handed_on() -> Iterator[None]:
    """Inside this context, processes that are started can read this process's standard input with `open_input`."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        path = str(Path(folder) / "input")
        os.mkfifo(path)
        os.environ |= {INPUT: path, IS_TYPED: str(int(is_typed()))}
        threading.Thread(target=_copy, args=(path,), daemon=True).start()
        try:
            yield
        finally:
            del os.environ[INPUT], os.environ[IS_TYPED]


def is_handed_on() -> bool:
    """Whether this process was started with the input of another one."""
    return INPUT in os.environ


def is_typed() -> bool:
    """Whether somebody types the input."""
    return os.environ[IS_TYPED] == "1" if IS_TYPED in os.environ else sys.stdin.isatty()


def open_input() -> TextIO:
    """This process's standard input, or that of the process which started the job."""
    return open(os.environ[INPUT], encoding="utf-8") if is_handed_on() else sys.stdin


def _copy(path: str) -> None:
    with suppress(OSError, ValueError), open(path, "wb", buffering=0) as target:
        for line in sys.stdin.buffer:
            target.write(line)
