"""sha256 of several arrays at the same time, in threads of its own: hashing takes longer than writing."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

THREADS = 2
BEHIND = 64  # blocks that may wait to be hashed


class Digest:
    """The sha256 of one array. One of the threads adds its blocks, in order."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._sha256, self._thread = hashlib.sha256(), thread

    def update(self, block: memoryview) -> Future[None]:
        return self._thread.submit(self._sha256.update, block)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


class Hashing:
    """Digests, spread over threads."""

    def __init__(self) -> None:
        self._threads = deque(ThreadPoolExecutor(1) for _ in range(THREADS))
        self._waiting: deque[Future[None]] = deque()

    def digest(self) -> Digest:
        self._threads.rotate()
        return Digest(self._threads[0])

    def update(self, digest: Digest, block: memoryview) -> None:
        """Add a block. It must not change before `close` returns."""
        self._waiting.append(digest.update(block))
        if len(self._waiting) > BEHIND:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Wait until every block is hashed."""
        for thread in self._threads:
            thread.shutdown()
