"""Standard input, line by line, whatever bytes it has."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

from tandem.errors import UserError
from tandem.files.text import likely_encoding

BYTE_ORDER_MARK = "\ufeff"
KEEP_BYTES = "surrogateescape"


def open_input() -> TextIO:
    """Standard input.

    Bytes that are no text become halves of surrogate pairs, so `is_text` can tell which line has them: Python decodes
    many lines at once, and would lose all of them.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(errors=KEEP_BYTES)
    return sys.stdin


def typed_line(prompt: str) -> str | None:
    """The next line, without its end; None at the end of the input. A terminal shows `prompt` before it.

    A line that is not text is left out: it comes as "", and is named on standard error.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        line = input(prompt if sys.stdin.isatty() else "").removeprefix(BYTE_ORDER_MARK)
    except EOFError:
        return None
    if is_text(line):
        return line
    print("> this line is not UTF-8 text: it is left out", file=sys.stderr)
    return ""


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
