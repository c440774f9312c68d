"""Tokenising blocks of rows with several workers, in order."""

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
    """All blocks, tokenised by `job`, in order. The result is the same for any number of `workers`.

    Each worker uses one core. A single worker is this process. The number of blocks in memory is limited.
    """
    if workers == 1:
        with _one_core_each():
            yield from map(job, blocks)
        return
    with _one_core_each(), _pool(job, workers) as pool:
        pending: deque[Future[TokenizedChunk]] = deque()
        try:
            for block in blocks:
                pending.append(
                    pool.submit(_work, block) if isinstance(pool, ProcessPoolExecutor) else pool.submit(job, block)
                )
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _pool(job: ChunkTokenizer, workers: int) -> Executor:
    """Threads where the engine is fast: they share its cache, and send no data. Else processes."""
    if job.engine.threads_suffice:
        return ThreadPoolExecutor(workers)
    # Spawned: a forked child could inherit a lock that a thread of the tokenizers library holds.
    return ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,))


_job: ChunkTokenizer  # of this worker process


def _start(job: ChunkTokenizer) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one will end it
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when its parent ends. A parent that is killed cannot end its workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block) -> TokenizedChunk:
    return _job(block)


def _one_core_each() -> AbstractContextManager[None]:
    """Keep the tokenizers library to one core, here and in processes that are started inside the `with`."""
    return environment("TOKENIZERS_PARALLELISM", "false")
