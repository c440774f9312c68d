"""What preprocessing has tokenised so far, on disk. So a run that was killed can continue where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tandem.data.indexed import IndexedDataset, publish, write_index
from tandem.data.preprocess.chunks import COUNTERS, Reject, TokenizedChunk
from tandem.errors import UserError
from tandem.files.lock import BusyError, read_holder, write_holder
from tandem.logs import log

_SECONDS_BETWEEN_SAVES = 0.5  # or longer, if the last save is not finished
_REJECTS, _HASHES = "rejects.jsonl", "hashes"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 of everything that decides the output."""
    return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS, default=str)).hexdigest()


class Spool:
    """The folder `{output_prefix}.unfinished`.

    It has a file of tokens and one of lengths for each output key, a file of rejected rows, and one of hashes.
    `progress.json` says how much of each file belongs to whole blocks.

    Args:
        keys: output keys.
        identity: `fingerprint` of the run; files of a run with another one are discarded.

    Attributes:
        blocks: number of blocks of the input that are done.
        counters: the `COUNTERS` of `TokenizedChunk` by name, for all blocks; `counts` and `dropped` are two of them.
        kept_of: kept documents, by the number of their source.
        rejected: rows that could not be used; `first_reason` is the reason of the first.

    Raises:
        BusyError: another process is writing the same output.
    """

    def __init__(self, output_prefix: str, keys: Iterable[str], identity: str) -> None:
        self.folder = Path(f"{output_prefix}.unfinished")
        self.keys = tuple(keys)
        self._identity = identity
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be created: {error.strerror}; choose another --output-prefix"
            ) from None
        if any(self.folder.iterdir()) and not (self.folder / "lock").exists():
            raise UserError(f"{self.folder}: holds files that tandem did not write; choose another --output-prefix")
        self._lock = FileIO(self.folder / "lock", "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = read_holder(self._lock) or "another process"
            raise BusyError(f"{output_prefix}: {holder} is writing this output; wait for it") from None
        write_holder(self._lock)
        names = [f"{key}.{suffix}" for key in self.keys for suffix in ("bin", "lengths")]
        progress = self._read_progress([*names, _REJECTS, _HASHES])
        self.blocks: int = progress["blocks"]
        self.counters = {name: Counter(progress.get(name, {})) for name in COUNTERS}
        self.counts, self.dropped = self.counters["counts"], self.counters["dropped"]
        self.kept_of = Counter(progress["kept_of"])
        self.rejected: int = progress["rejected"]
        self.first_reason: str = progress["first_reason"]
        self._files = {name: _open_at(self.folder / name, size) for name, size in progress["sizes"].items()}
        self._disk = ThreadPoolExecutor(1)
        self._saving = self._disk.submit(lambda: None)
        self._saved_at = time.monotonic()

    def add(self, chunk: TokenizedChunk) -> None:
        """Append the tokens of the next block."""
        for key, (tokens, lengths) in chunk.columns.items():
            if key in self.keys:
                self._files[f"{key}.bin"].write(np.ascontiguousarray(tokens, "<i4").data)
                self._files[f"{key}.lengths"].write(lengths.astype("<i4").data)
        for reject in chunk.rejects:
            self._add_reject(reject)
        self._files[_HASHES].write(chunk.hashes.astype("<u8").data)
        for name in self.counters:
            self.counters[name] += getattr(chunk, name)
        self.kept_of[str(chunk.source)] += chunk.counts["kept"]
        self.blocks += 1
        if self._saving.done() and time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES:
            self._start_saving()

    def save(self) -> None:
        """Save everything to the disk, with `progress.json`."""
        self._start_saving()
        self._saving.result()

    def _start_saving(self) -> None:
        """Save in a thread, so the disk works while tokens are made, and little is left to save at the end."""
        self._saving.result()
        for file in self._files.values():
            file.flush()
        progress = {
            "identity": self._identity,
            "blocks": self.blocks,
            **self.counters,
            "kept_of": self.kept_of,
            "rejected": self.rejected,
            "first_reason": self.first_reason,
            "sizes": {name: file.tell() for name, file in self._files.items()},
        }
        self._saving = self._disk.submit(self._save, orjson.dumps(progress))
        self._saved_at = time.monotonic()

    def _save(self, progress: bytes) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
        part = self.folder / "progress.part"
        part.write_bytes(progress)
        os.replace(part, self.folder / "progress.json")

    def datasets(self) -> dict[str, IndexedDataset]:
        """The sequences of each key, for reading."""
        self.save()
        for key in self.keys:
            write_index(self.folder / f"{key}.idx", self._lengths(key), np.int32)
        return {key: IndexedDataset(self.folder / key) for key in self.keys}

    def publish(self, prefixes: Mapping[str, str]) -> None:
        """Give the files of each key their final names."""
        self.save()
        for key, prefix in prefixes.items():
            publish(self.folder / f"{key}.bin", self._lengths(key), np.int32, prefix)

    def publish_rejects(self, path: Path) -> None:
        """Write the rejected rows, one line `{reason, content}` each. Without any, remove an earlier run's file."""
        if self.rejected:
            self._files[_REJECTS].flush()
            os.replace(self.folder / _REJECTS, path)
        else:
            path.unlink(missing_ok=True)

    def repeated(self) -> int:
        """How many conversations stand in the data more than once, not counting the first of each."""
        self._files[_HASHES].flush()
        hashes = np.fromfile(self.folder / _HASHES, "<u8")
        return len(hashes) - len(np.unique(hashes))

    def remove(self) -> None:
        self._disk.shutdown()
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.folder)
        self._lock.close()

    def _add_reject(self, reject: Reject) -> None:
        self.rejected += 1
        self.first_reason = self.first_reason or reject.reason
        content = reject.content
        if isinstance(content, bytes):
            content = content.rstrip(b"\r\n").decode(errors="replace")
        self._files[_REJECTS].write(orjson.dumps({"reason": reject.reason, "content": content}, default=str) + b"\n")

    def _lengths(self, key: str) -> np.ndarray:
        return np.fromfile(self.folder / f"{key}.lengths", "<i4")

    def _read_progress(self, names: list[str]) -> dict[str, Any]:
        """The progress of a run of the same identity, if all its files exist; else the progress of a new run."""
        fresh: dict[str, Any] = {"blocks": 0, "kept_of": {}, "rejected": 0, "first_reason": ""}
        fresh |= {name: {} for name in COUNTERS}
        fresh["sizes"] = dict.fromkeys(names, 0)
        path = self.folder / "progress.json"
        if not path.is_file():
            return fresh
        try:
            progress = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError:
            log.info("> %s is damaged: preprocessing begins again", path)
            return fresh
        if progress["identity"] != self._identity:
            return fresh
        for name, size in progress["sizes"].items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size < size:
                return fresh
        return dict(progress)


def _open_at(path: Path, size: int) -> Any:
    """Open a file for appending. Whatever is after the first `size` bytes is cut off."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
