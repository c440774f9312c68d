"""Blocks of rows through workers, in order."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context, parent_process
from threading import Thread

from tandem.data.preprocess.chunks import ChunkTokenizer, TokenizedChunk
from tandem.data.sources.readers import Block
from tandem.data.tokens.encoder import environment


def tokenize_blocks(job: ChunkTokenizer, blocks: Iterable[Block], workers: int) -> Iterator[TokenizedChunk]:
    """All blocks tokenised by `job`, in order whatever the number of `workers`; each of them uses one core.

    A bounded number of blocks is in memory. One worker is this process itself.
    """
    if workers == 1:
        with _one_core_each():
            yield from map(job, blocks)
        return
    with _one_core_each(), _pool(job, workers) as pool:
        under_way: deque[Future[TokenizedChunk]] = deque()
        try:
            for block in blocks:
                under_way.append(
                    pool.submit(_work, block) if isinstance(pool, ProcessPoolExecutor) else pool.submit(job, block)
                )
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _pool(job: ChunkTokenizer, workers: int) -> Executor:
    """Threads share the engine's cache, and nothing has to travel; processes where the engine is slow."""
    if job.engine.threads_suffice:
        return ThreadPoolExecutor(workers)
    # Spawned, since a forked child could inherit a lock that a thread of the tokenizers library holds.
    return ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,))


_job: ChunkTokenizer  # of this worker process


def _start(job: ChunkTokenizer) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block) -> TokenizedChunk:
    return _job(block)


def _one_core_each() -> AbstractContextManager[None]:
    """Keep the tokenizers library to one core, here and in processes started meanwhile."""
    return environment("TOKENIZERS_PARALLELISM", "false")
