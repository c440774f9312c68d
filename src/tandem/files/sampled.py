"""Whether two files are the same, without reading all of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

BLOCKS, BLOCK_BYTES = 64, 4096


def sampled_digest(path: str | Path) -> str:
    """A hash of a file's size and of blocks that are spread over it, also its first and last bytes.

    It tells other data of the same size apart, but not a few changed bytes in a large file.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - BLOCK_BYTES)
    with open(path, "rb") as file:
        for number in range(BLOCKS):
            file.seek(last * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
