"""Files that may be compressed. The end of a name says how, in any case of letters."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO

COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises
_BUFFER_BYTES = 1 << 20


def has_suffix(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends with one of `suffixes`, which are in small letters.

    >>> has_suffix(Path("data/A.JSONL.GZ"), (".jsonl.gz",))
    True
    """
    return file.name.lower().endswith(suffixes)


def open_bytes(file: Path) -> BinaryIO:
    """A file's bytes, decompressed, as a stream with `peek`.

    Raises:
        OSError: the file cannot be opened. Reading a damaged file raises one of `DAMAGED`.
    """
    compression = file.suffix.lower()
    if compression == ".gz":
        return io.BufferedReader(gzip.open(file), _BUFFER_BYTES)
    if compression == ".xz":
        return io.BufferedReader(lzma.open(file), _BUFFER_BYTES)
    if compression == ".bz2":
        return io.BufferedReader(bz2.open(file), _BUFFER_BYTES)
    if compression == ".zst":
        # Not the zstandard package: it reads a truncated file without an error. Imported here, because that is slow.
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), _BUFFER_BYTES)
    return file.open("rb")
