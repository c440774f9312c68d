"""Computes the log-probabilities of a reference, and keeps them in a file next to the data, which later runs share.

The file's name holds a hash of all that the numbers depend on: weights, data, template, length and dtype. A file may
lack samples that nobody has needed yet; they are NaN in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from tandem.backends.interface import Engine
from tandem.data.batch import Sample, collate
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.preferences import AnswersDataset
from tandem.data.kinds import Kind
from tandem.data.record import record_of
from tandem.errors import UserError
from tandem.files.sha256 import sha256
from tandem.launch.world import Communicator
from tandem.logs import log
from tandem.parallel.grid import Grid
from tandem.training.feed import Share
from tandem.training.logs.log import log_notice

MICRO_BATCHES = 16  # of each data rank, between two times that ranks share what they have computed
SECONDS_BETWEEN_SAVES = 300


@dataclass(frozen=True)
class Reference:
    """The weights that answers are compared with.

    Attributes:
        sha256: of these weights.
        held: inside this context, the engine computes with them.
    """

    sha256: str
    held: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class ReferenceTables:
    """The tables of some data, and the processes that fill them.

    Attributes:
        tables: by prefix: see `AnswersDataset`.
    """

    engine: Engine
    communicator: Communicator
    grid: Grid
    micro_batch_size: int
    kind: Kind
    seq_length: int
    tables: Mapping[str, np.ndarray]

    def fill(self, reference: Reference, sets: Sequence[tuple[Dataset, range]]) -> None:
        """Fill the tables for these samples of datasets, from files or by computing. Collective.

        Raises:
            UserError: the reference gives an answer no finite log-probability.
        """
        files = self._open_files(reference.sha256)
        missing = _without_reference(sets)
        if (first := next(missing, None)) is not None:
            with reference.held():
                self._compute(chain([first], missing), files)

    def _compute(self, samples: Iterator[Sample], files: dict[str, Path]) -> None:
        """Compute the reference of samples, in place. Each data rank computes its share, and all ranks get all."""
        share = Share(self.micro_batch_size, self.grid.data_size, self.grid.place(self.communicator.world.rank).data)
        started = saved = time.monotonic()
        done = 0
        while block := list(islice(samples, share.micro_batch_size * share.data_size * MICRO_BATCHES)):
            sums = self._sums(block, share)
            for sample, values in zip(_in_order(block, share), sums, strict=True):
                assert sample.answers is not None
                sample.answers.reference[...] = values
                if not np.isfinite(values).all():
                    raise UserError(
                        f"the reference gives an answer a log-probability of {values}: its weights are damaged"
                    )
            done += len(block)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                saved = time.monotonic()
                log_notice(f"reference: log-probabilities of {done:,} samples so far")
                self._save(files)
        self._save(files)
        seconds = time.monotonic() - started
        where = ", ".join(map(str, files.values())) or "memory only"
        log_notice(f"reference: log-probabilities of {done:,} samples computed in {seconds:.1f} s, kept in {where}")

    def _sums(self, block: Sequence[Sample], share: Share) -> Iterator[np.ndarray]:
        """The sums of log p(label) of each sample's documents, float64 [documents], of all data ranks."""
        mine = [collate([block[number] for number in numbers]) for numbers in share.samples(0, len(block))]
        found = self.engine.log_probabilities(mine)
        sums = [np.add.reduceat(values, batch.cu_seqlens[:-1]) for batch, values in zip(mine, found)]
        everyone = self.communicator.all_gather(np.concatenate([np.empty(0), *sums]).tolist())
        flat = [value for rank in self.grid.group("data", self.grid.place(0)) for value in everyone[rank]]
        return iter(np.array(flat).reshape(len(block), -1))

    def _open_files(self, weights: str) -> dict[str, Path]:
        """The files of all prefixes. What is in them is put into the tables, if all ranks find the same."""
        names = None
        if self.communicator.world.rank == 0:
            names = {prefix: self._name(prefix, weights) for prefix in self.tables}
        names = self.communicator.all_gather(names)[0]
        files = {}
        for prefix, name in names.items():
            path = Path(f"{prefix}_reference_{name}.npy")
            table = self.tables[prefix]
            found = read_table(path, table.shape)
            digest = None if found is None else hashlib.sha256(found.tobytes()).hexdigest()
            if len(set(self.communicator.all_gather(digest))) == 1 and found is not None:
                table[...] = found
                known = int(np.count_nonzero(~np.isnan(found).any(axis=1)))
                log_notice(f"reference: log-probabilities of {known:,} samples from {path}")
            if os.access(path.parent, os.W_OK):
                files[prefix] = path
            else:
                log_notice(f"reference: {path.parent} cannot be written to, so the log-probabilities are not kept")
        return files

    def _name(self, prefix: str, weights: str) -> str:
        """A hash of all that the log-probabilities of a prefix depend on."""
        record = record_of(prefix)
        files = [f"{self.kind.pair(prefix, key)}{suffix}" for key in self.kind.keys for suffix in (".bin", ".idx")]
        facts = {
            "weights": weights,
            "data": [sha256(file) for file in files],
            "template": record["template"] if record else None,
            "seq_length": self.seq_length,
            "dtype": self.engine.param_dtype,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _save(self, files: dict[str, Path]) -> None:
        """Write the tables, on the first process of each machine. What another run has added meanwhile is kept."""
        if self.communicator.world.local_rank:
            return
        for prefix, path in files.items():
            table = self.tables[prefix]
            found = read_table(path, table.shape)
            whole = table if found is None else np.where(np.isnan(table), found, table)
            work = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
            with open(work, "wb") as file:
                np.save(file, whole)
                file.flush()
                os.fsync(file.fileno())
            work.replace(path)


def _without_reference(sets: Sequence[tuple[Dataset, range]]) -> Iterator[Sample]:
    """The samples whose reference is not known. Some may come twice."""
    for dataset, numbers in sets:
        for answers, number in map(dataset.place, numbers):
            assert isinstance(answers, AnswersDataset)
            if not answers.is_referred(number):
                yield answers[number]


def _in_order(block: Sequence[Sample], share: Share) -> Iterator[Sample]:
    """The samples as `_sums` gives their values: by data rank."""
    for rank in range(share.data_size):
        for numbers in replace(share, data_rank=rank).samples(0, len(block)):
            yield from (block[number] for number in numbers)


def read_table(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The table in a file; None when there is none, or a damaged one, which is said."""
    if not path.exists():
        return None
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s: damaged: %s; computed again", path, error)
        return None
    if table.shape != shape or table.dtype != np.float64:
        log.warning("%s: damaged: %s %s; computed again", path, table.dtype, list(table.shape))
        return None
    return np.asarray(table)
