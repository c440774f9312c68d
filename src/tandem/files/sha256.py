"""The sha256 of files, as a program: names on standard input, parted by NUL, hashes on standard output, a line each.

It is run by itself and not by a thread, which would wait whenever Python's lock is held, as it is while a tokenizer is
loaded; so it imports nothing of tandem, whose packages would take longer to load than most files to hash.
"""

from __future__ import annotations

import hashlib
import os
import sys

_BYTES = 1 << 20


def main() -> None:
    names = sys.stdin.buffer.read().split(b"\0")
    print("\n".join([sha256(os.fsdecode(name)) for name in names]))


def sha256(name: str) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BYTES))
    with open(name, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


if __name__ == "__main__":
    main()
