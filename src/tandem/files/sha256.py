"""The sha256 of files, as a program.

It reads file names from standard input, separated by NUL, and prints a line with each file's hash.

It is a process of its own: a thread would wait whenever Python's lock is held, as while a tokenizer is loaded. It
imports nothing of tandem: loading those packages would take longer than hashing most files.
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
