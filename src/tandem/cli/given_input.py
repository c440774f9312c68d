"""Standard input for a command that runs as several processes: the first one gets what is typed here."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tandem.errors import UserError
from tandem.files.text import likely_encoding

INPUT, IS_TYPED = "TANDEM_INPUT", "TANDEM_INPUT_IS_TYPED"  # variables for the processes of the job
BYTE_ORDER_MARK = "\ufeff"
KEEP_BYTES = "surrogateescape"


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
    """This process's standard input, or that of the process which started the job.

    Bytes that are no text become halves of surrogate pairs, so `is_text` can tell which line has them: Python decodes
    many lines at once, and would lose all of them.
    """
    if is_handed_on():
        return open(os.environ[INPUT], encoding="utf-8", errors=KEEP_BYTES)
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(errors=KEEP_BYTES)
    return sys.stdin


def is_text(line: str) -> bool:
    """Whether a line of `open_input` was text."""
    return not any("\ud800" <= character <= "\udfff" for character in line)


def lines_of(source: TextIO) -> Iterator[str]:
    """Each line of an input, without its end and without a byte order mark.

    Raises:
        UserError: a line is not text.
    """
    for number, line in enumerate(iter(source.readline, ""), 1):
        if not is_text(line):
            encoding = source.encoding or "utf-8"
            content = line.encode(encoding, KEEP_BYTES).strip()
            raise UserError(
                f"standard input, line {number}: {content[:60]!r} is not {encoding.upper()} text: convert it, as with "
                f"iconv -f {likely_encoding(content) or 'GBK'} -t UTF-8"
            )
        yield line.removeprefix(BYTE_ORDER_MARK if number == 1 else "").rstrip("\n")


def _copy(path: str) -> None:
    with suppress(OSError, ValueError), open(path, "wb", buffering=0) as target:
        for line in sys.stdin.buffer:
            target.write(line)
