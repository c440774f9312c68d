"""Chunks of rows through worker processes, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from tandem.data.readers import Row
from tandem.data.tokenize import ChunkTokenizer, TokenizedChunk

_CHUNK_ROWS, _CHUNK_SIZE = 512, 1 << 20  # a chunk ends at either


def tokenize_rows(job: ChunkTokenizer, rows: Iterable[Row], workers: int) -> Iterator[TokenizedChunk]:
    """All rows tokenised by `job`, in order whatever the number of `workers`; each of them uses one core.

    A bounded number of chunks is in memory. One worker is this process itself.
    """
    if workers == 1:
        with _one_core_each():
            yield from map(job, _chunks(rows))
        return
    # Spawned, since a forked child could inherit a lock that a thread of the tokenizers library holds.
    with _one_core_each(), ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,)) as pool:
        under_way: deque[Future[TokenizedChunk]] = deque()
        try:
            for chunk in _chunks(rows):
                under_way.append(pool.submit(_work, chunk))
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_job: ChunkTokenizer  # of this worker process


def _start(job: ChunkTokenizer) -> None:
    global _job
    _job = job


def _work(chunk: list[Row]) -> TokenizedChunk:
    return _job(chunk)


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Keep the tokenizers library to one core, here and in processes started meanwhile."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
