"""The micro-batches of a run or of an evaluation, step after step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from types import TracebackType

from tandem.data.batch import MicroBatch, collate
from tandem.data.datasets.dataset import Dataset


@dataclass(frozen=True)
class Share:
    """The part of every batch that one data rank takes: every `data_size`-th micro-batch, as in Megatron.

    >>> list(Share(micro_batch_size=2, data_size=2, data_rank=1).samples(start=0, count=8))
    [range(2, 4), range(6, 8)]
    """

    micro_batch_size: int
    data_size: int = 1
    data_rank: int = 0

    def micro_batches(self, dataset: Dataset, start: int, count: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the `count` samples from `start`. The last one may be smaller."""
        for samples in self.samples(start, count):
            yield collate([dataset[index] for index in samples])

    def samples(self, start: int, count: int) -> Iterator[range]:
        """The numbers of the samples in each micro-batch of this rank."""
        size = self.micro_batch_size
        for first in range(start + self.data_rank * size, start + count, self.data_size * size):
            yield range(first, min(first + size, start + count))


class Feed:
    """Reads one data rank's share of each step, or of each batch of an evaluation.

    What is read ahead is only kept: it counts as consumed when it is taken, and an error in it is raised then. Leaving
    the feed as a context ends its thread.

    Args:
        ahead: whether a thread reads the next one while the caller computes.
    """

    def __init__(self, dataset: Dataset, share: Share, *, ahead: bool) -> None:
        self._dataset, self._share = dataset, share
        self._thread = ThreadPoolExecutor(1, "tandem-feed") if ahead else None
        self._next: tuple[int, int, Future[list[MicroBatch]]] | None = None
        self._reading = Lock()  # a dataset remembers the epoch that was read last

    def take(self, start: int, count: int) -> list[MicroBatch]:
        """This rank's micro-batches of the `count` samples from `start`.

        Raises:
            UserError: as reading a sample does, also if it was read ahead.
        """
        ready, self._next = self._next, None
        if ready is not None and ready[:2] == (start, count):
            return ready[2].result()
        return self._read(start, count)

    def begin(self, start: int, count: int) -> None:
        """Read ahead what will be taken next, if that helps on this device."""
        if self._thread is not None:
            self._next = (start, count, self._thread.submit(self._read, start, count))

    def origin(self, sample: int) -> str:
        """Where a sample is in the files."""
        with self._reading:
            return self._dataset.origin(sample)

    def _read(self, start: int, count: int) -> list[MicroBatch]:
        with self._reading:
            return list(self._share.micro_batches(self._dataset, start, count))

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
