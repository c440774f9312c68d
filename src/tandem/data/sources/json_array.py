"""The elements of a JSON array, one at a time: a file of any size is read with little memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tandem.errors import UserError

_READ_BYTES = 1 << 20
# A whole string, or a bracket or comma. A quote alone begins a string whose end is not read yet.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)


def is_array(stream: BinaryIO) -> bool:
    """Whether the first character other than white space is `[`. The stream does not move."""
    start = stream.peek(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n")  # type: ignore[attr-defined]
    return start.startswith(b"[")


def iter_elements(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    """The bytes of each element, not parsed. `stream` is at the beginning of the array, or at white space before it.

    Raises:
        UserError: the array does not end, or something follows it.
    """
    while stream.read(1) != b"[":
        pass
    buffer = b""
    begin = position = depth = count = 0
    while True:
        match = _TOKEN.search(buffer, position)
        if match is None or match.group() == b'"':
            more = stream.read(max(_READ_BYTES, len(buffer) - begin))  # a long string is searched again
            if not more:
                raise UserError(f"{file}: the JSON array does not end: truncated in row {count + 1}")
            resume = len(buffer) if match is None else match.start()
            position, buffer, begin = resume - begin, buffer[begin:] + more, 0
            continue
        token, position = match.group(), match.end()
        if token in b"[{":
            depth += 1
        elif depth and token in b"]}":
            depth -= 1
        elif depth == 0 and token in b",]}":
            element = buffer[begin : match.start()].strip()
            if element or token == b"," or count:  # `[]` has no element
                count += 1
                yield element
            if token != b",":
                break
            begin = position
    if (buffer[position:] + stream.read(_READ_BYTES)).strip():
        raise UserError(f"{file}: the JSON array ends after row {count}, but text follows it; expected one array")
