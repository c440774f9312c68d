"""A large file, written once from its beginning to its end, past the system's page cache where the disk allows that.

A checkpoint's pages are of no use to the run that writes them: caching them takes processor time, and memory from the
training data.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

CHUNK = 2 << 20  # bytes that are written at a time; a multiple of every disk's block
CHUNKS = 4  # some wait for the disk while one is filled
SMALLEST = 64 << 10  # the same for one of hundreds of files
TOGETHER = 64 << 20  # bytes that chunks of all files take, until they are that small
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux's flag


def chunk_for(files: int) -> int:
    """How many bytes each of so many files, open at once, writes at a time.

    >>> [chunk_for(files) >> 10 for files in (1, 8, 9, 64, 1000)]
    [2048, 2048, 1792, 256, 64]
    """
    share = TOGETHER // (CHUNKS * max(files, 1))
    return max(min(share - share % SMALLEST, CHUNK), SMALLEST)


class LargeFile:
    """A file that a thread writes. `write` copies its data; `close` returns when all of it is on the disk.

    Args:
        chunk: bytes that are written at a time. Memory is taken for CHUNKS times as many.

    Raises:
        OSError: with the file's name. When a write fails, a later `write` or `close` may be the one that raises.
    """

    def __init__(self, path: str | Path, chunk: int = CHUNK) -> None:
        self.path = Path(path)
        self._chunk = chunk
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = _open(self.path)
        self._chunks = deque(np.frombuffer(mmap.mmap(-1, chunk), np.uint8) for _ in range(CHUNKS))  # aligned to pages
        self._filled = self._position = 0  # bytes in the first chunk, and before it
        self._thread = ThreadPoolExecutor(1)
        self._writing: deque[Future[None]] = deque()

    def tell(self) -> int:
        return self._position + self._filled

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`, and return its number of bytes."""
        remaining: np.ndarray = np.frombuffer(data, np.uint8)
        while remaining.size:
            room = self._chunks[0][self._filled :]
            count = min(room.size, remaining.size)
            room[:count], remaining = remaining[:count], remaining[count:]
            self._filled += count
            if self._filled == self._chunk:
                self._send()
        return len(data)

    def flush(self) -> None:
        """For `zipfile`; `close` flushes."""

    def close(self) -> None:
        try:
            self._wait(0)
            self._use_page_cache()  # the rest is smaller than a block
            self._put(self._chunks[0][: self._filled], self._position)
            os.fsync(self._descriptor)
        finally:
            self.abort()

    def abort(self) -> None:
        """Stop writing. The file is not whole."""
        self._thread.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _send(self) -> None:
        self._writing.append(self._thread.submit(self._put, self._chunks[0], self._position))
        self._position, self._filled = self._position + self._chunk, 0
        self._chunks.rotate(-1)
        self._wait(CHUNKS - 1)

    def _wait(self, count: int) -> None:
        """Return when at most `count` chunks are not written yet."""
        while len(self._writing) > count:
            self._writing.popleft().result()

    def _put(self, data: np.ndarray, position: int) -> None:
        remaining = data.data
        while remaining:
            try:
                done = os.pwrite(self._descriptor, remaining, position)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._use_page_cache():
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                continue
            remaining, position = remaining[done:], position + done

    def _use_page_cache(self) -> bool:
        """From now on, write through the page cache. Returns False when that was so already."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)


def _open(path: Path) -> int:
    """Open for writing, with DIRECT if the file system has it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
