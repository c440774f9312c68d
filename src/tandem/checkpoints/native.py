"""The native checkpoint: Megatron's folders with safetensors, and an index that any layout can be read from.

    latest_checkpointed_iteration.txt      the newest whole iteration; written last
    iter_0000010/
        index.json                         global name -> shape, dtype, slices (file, boxes, sha256); config, layout
        mp_rank_00[_000]/model.safetensors       a rank's slices of the weights
        mp_rank_00[_000]/optimizer.safetensors   its slices of master weights and Adam's moments
        hf/                                config.json and tokenizer files, for export
        *.json, *.yaml                     documents of the trainer: counters, data position, settings

Names in the files are global. Both backends write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.arrays import row_blocks
from tandem.checkpoints.folders import COMPANIONS, TRACKER, find_iteration, iteration_folder, rank_folder
from tandem.checkpoints.hashing import Digest, Hashing
from tandem.checkpoints.hf import companions_of, write_companions
from tandem.checkpoints.interface import (
    DTYPES,
    Companions,
    Kind,
    RowsWritten,
    TensorSource,
    check_names,
    check_shape,
    dtype_name,
)
from tandem.checkpoints.publish import Publication, check_free_space, write_text_atomically
from tandem.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import parameter_count, tensor_table
from tandem.parallel.grid import Grid, saved_shards
from tandem.parallel.layout import Layout, Shard, shards
from tandem.parallel.slices import Part, cut_rows, overlaps, tiles, transfer
from tandem.parallel.world import Communicator

FORMAT = "tandem"
VERSION = 1
INDEX = "index.json"
PROMPT_FILE = "prompt.json"  # the template that the weights were fine-tuned on, as the data's record gave it


def key_of(name: str, kind: Kind) -> str:
    """A tensor's name inside a file."""
    return name if kind == "model" else f"{kind}.{name}"


def _bytes(tensor: np.ndarray) -> memoryview:
    return tensor.reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class _Planned:
    """A slice that will be written: which part of which tensor, in which file."""

    file: str
    kind: Kind
    shard: Shard

    @property
    def key(self) -> str:
        return key_of(self.shard.spec.name, self.kind)


class _SliceFiles:
    """The files that one process writes, each made when its first slice comes, and their entries in the index."""

    def __init__(self, work: Path, plan: Sequence[_Planned], dtypes: Mapping[Kind, str]) -> None:
        self._work = work
        self._entries: dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]] = {}
        for item in plan:
            self._entries.setdefault(item.file, {})[item.key] = (DTYPES[dtypes[item.kind]], item.shard.shape)
        self._writers: dict[str, SafetensorsWriter] = {}
        self._hashing = Hashing()
        self._digests: dict[_Planned, Digest] = {}
        self.index: dict[str, dict[str, Any]] = {}

    @property
    def keys(self) -> set[str]:
        """Of which tensors something was written."""
        return {item.key for item in self._digests}

    def write(self, item: _Planned, rows: np.ndarray, dtype: np.dtype) -> None:
        """Append the next rows of a slice. They must stay as they are until `close`."""
        if item.file not in self._writers:
            self._writers[item.file] = SafetensorsWriter(self._work / item.file, self._entries[item.file])
        if item not in self._digests:
            self._digests[item] = self._hashing.digest()
        digest = self._digests[item]
        rows = np.ascontiguousarray(rows, dtype=dtype)
        for first, last in row_blocks(rows.shape, dtype):
            self._hashing.update(digest, _bytes(rows[first:last]))
            self._writers[item.file].write(item.key, rows[first:last])

    def close(self) -> None:
        """The files are whole and on the disk, and the index has an entry of every slice."""
        assert self._writers.keys() == self._entries.keys(), "a file was announced and nothing written to it"
        for writer in self._writers.values():
            writer.close()
        self._hashing.close()
        for item, digest in self._digests.items():
            self._enter(item, digest.hexdigest())

    def abort(self) -> None:
        self._hashing.close()
        for writer in self._writers.values():
            writer.abort()

    def _enter(self, item: _Planned, digest: str) -> None:
        spec = item.shard.spec
        dtype, _ = self._entries[item.file][item.key]
        entry = self.index.setdefault(
            item.key,
            {"shape": spec.shape, "dtype": dtype_name(dtype), "stacked_dim": spec.split.dim or 0, "slices": []},
        )
        entry["slices"].append({"file": item.file, "boxes": item.shard.part.boxes, "sha256": digest})


@dataclass(frozen=True)
class _Iteration:
    """What every native checkpoint says of itself, beside its slices."""

    config: ModelConfig
    layout: Layout
    dtypes: Mapping[Kind, str]
    number: int
    companions: Companions
    documents: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return parameter_count(self.config) * sum(DTYPES[dtype].itemsize for dtype in self.dtypes.values())

    def check_complete(self, where: Path, keys: Collection[str]) -> None:
        missing = [
            key_of(name, kind)
            for kind in self.dtypes
            for name in tensor_table(self.config)
            if key_of(name, kind) not in keys
        ]
        if missing:
            raise UserError(f"{where}: {missing[0]} was never written ({len(missing)} tensors missing)")

    def describe(self, work: Path, index: Mapping[str, Any], *, elsewhere: bool) -> None:
        """Write all but the slices into `work`. `elsewhere`: other machines hold some of the files."""
        write_companions(work / COMPANIONS, self.companions, self.config, self.dtypes["model"])
        for name, text in self.documents.items():
            (work / name).write_text(text, encoding="utf-8")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "iteration": self.number,
            "model": self.config.to_dict(),
            "layout": asdict(self.layout),
            "kinds": dict(self.dtypes),
            **({"elsewhere": True} if elsewhere else {}),
            "tensors": index,
        }
        (work / INDEX).write_text(json.dumps(content) + "\n", encoding="utf-8")


class NativeSink:
    """Write one iteration. Tensors come kind by kind, each kind in the tensor table's order.

    Args:
        dtypes: what is held for every tensor, and in which dtype ("model" first).
        documents: small text files of the trainer to store beside the index, by file name.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        layout: Layout,
        dtypes: Mapping[Kind, str],
        iteration: int,
        companions: Companions,
        documents: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self._dtypes, self._rows = dict(dtypes), RowsWritten()
        self._iteration = _Iteration(config, layout, self._dtypes, iteration, companions, dict(documents or {}))
        self._shards: dict[str, list[Shard]] = {name: [] for name in tensor_table(config)}
        for shard in shards(config, layout, tied_head_copy=False):
            # Replicated tensors are stored once, by the first tensor rank.
            if (shard.spec.split.dim is not None or shard.tensor_rank == 0) and 0 not in shard.shape:
                self._shards[shard.spec.name].append(shard)
        check_free_space(self.folder, self._iteration.nbytes)
        self._publication = Publication(iteration_folder(self.folder, iteration), replace=True)
        self._files = _SliceFiles(self._publication.work, self._plan(), self._dtypes)

    def write(self, name: str, rows: np.ndarray, kind: Kind = "model") -> None:
        first = self._rows.add(key_of(name, kind), rows, self._shards[name][0].spec.shape).start
        for shard in self._shards[name]:
            found = cut_rows(rows, first, shard.part)
            if found.size:
                self._files.write(self._planned(kind, shard), found, DTYPES[self._dtypes[kind]])

    def close(self) -> None:
        self._iteration.check_complete(self.folder, self._files.keys)
        self._files.close()
        self._iteration.describe(self._publication.work, self._files.index, elsewhere=False)
        self._publication.commit()
        write_text_atomically(self.folder / TRACKER, str(self._iteration.number))

    def abort(self) -> None:
        self._files.abort()
        self._publication.abort()

    def _plan(self) -> list[_Planned]:
        return [
            self._planned(kind, shard) for kind in self._dtypes for found in self._shards.values() for shard in found
        ]

    def _planned(self, kind: Kind, shard: Shard) -> _Planned:
        folder = rank_folder(self._iteration.layout, shard.tensor_rank, shard.pipeline_rank)
        return _Planned(f"{folder}/{'model' if kind == 'model' else 'optimizer'}.safetensors", kind, shard)


class NativeRankSink:
    """One rank's part in writing an iteration: each rank writes its own slices, none gathers the others'.

    Making it and `publish` are collective. Between them a rank calls `write_part` for what `saved_shards` lists, in
    order, and `finish`; neither waits for other ranks, so a thread of its own may do that.

    Args:
        by_rows: the kinds that are sharded by rows over data ranks.
        shared_storage: False when every machine has a disk of its own: each then gets a folder with its own ranks'
            files and the whole index.

    Raises:
        UserError: on every rank, when the folder cannot be made on one.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        grid: Grid,
        dtypes: Mapping[Kind, str],
        iteration: int,
        companions: Companions,
        documents: Mapping[str, str],
        communicator: Communicator,
        *,
        by_rows: Collection[Kind],
        shared_storage: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._dtypes, self._communicator = dict(dtypes), communicator
        self._iteration = _Iteration(config, grid.layout, self._dtypes, iteration, companions, dict(documents))
        self._elsewhere = not shared_storage
        world, place = communicator.world, grid.place(communicator.world.rank)
        self._rank_folder = rank_folder(grid.layout, place.tensor, place.pipeline)
        self._data_rank = place.data
        self._leads = world.leads(shared_storage=shared_storage)
        self._publication: Publication | None = None
        try:
            self._together(self._make_folder)
        except BaseException:
            if self._publication is not None:
                self._publication.abort()
            raise
        first = world.first_on_disk(shared_storage=shared_storage)
        plan = [
            self._planned(kind, shard)
            for kind in self._dtypes
            for shard in saved_shards(config, grid, world.rank, by_rows=kind in by_rows, first_rank=first)
        ]
        self._files = _SliceFiles(Publication.working_folder(self._final), plan, self._dtypes)

    def write_part(self, kind: Kind, shard: Shard, values: np.ndarray) -> None:
        assert values.shape == shard.shape, f"{shard.spec.name}: {values.shape} where {shard.shape} is laid out"
        self._files.write(self._planned(kind, shard), values, DTYPES[self._dtypes[kind]])

    def finish(self) -> None:
        """All of this rank's files are whole and on the disk."""
        self._files.close()

    def publish(self, error: BaseException | None = None) -> None:
        """Make the iteration visible, and the newest, when every rank has finished.

        Args:
            error: what kept this rank from finishing.

        Raises:
            UserError: on every rank, when one has failed; nothing is visible then.
        """
        try:
            found = self._communicator.all_gather([_say(error), None if error else self._files.index])
            failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text]
            if failures:
                raise UserError(f"{self._final} was not saved: {'; '.join(failures)}")
            self._together(lambda: self._publish([index for _, index in found]))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        self._files.abort()
        if self._publication is not None:
            self._publication.abort()

    @property
    def _final(self) -> Path:
        return iteration_folder(self.folder, self._iteration.number)

    def _together(self, act: Callable[[], None]) -> None:
        """Leaders act while the others wait; what fails on one fails on all."""
        failure: Exception | None = None
        if self._leads:
            try:
                act()
            except (UserError, OSError) as error:
                failure = error
        texts = self._communicator.all_gather(_say(failure))
        if failed := [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]:
            raise UserError(f"{self._final} was not saved: {'; '.join(failed)}") from failure

    def _make_folder(self) -> None:
        world = self._communicator.world
        # Without shared storage a machine holds what its ranks write; how many they are is not known to be equal.
        check_free_space(self.folder, self._iteration.nbytes // (world.size if self._elsewhere else 1))
        self._publication = Publication(self._final, replace=True)

    def _publish(self, fragments: Sequence[Mapping[str, Any]]) -> None:
        assert self._publication is not None
        index: dict[str, Any] = {
            key: {**entry, "slices": []} for fragment in fragments for key, entry in fragment.items()
        }
        for fragment in fragments:
            for key, entry in fragment.items():
                index[key]["slices"] += entry["slices"]
        self._iteration.check_complete(self._final, index)
        self._iteration.describe(self._publication.work, index, elsewhere=self._elsewhere)
        self._publication.commit()
        write_text_atomically(self.folder / TRACKER, str(self._iteration.number))

    def _planned(self, kind: Kind, shard: Shard) -> _Planned:
        suffix = f"_{self._data_rank:03d}" if self._data_rank else ""  # data ranks share a folder
        return _Planned(
            f"{self._rank_folder}/{'model' if kind == 'model' else 'optimizer'}{suffix}.safetensors", kind, shard
        )


def _say(error: BaseException | None) -> str | None:
    """An error in words, which can travel between ranks."""
    if error is None:
        return None
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _Slice:
    file: str
    part: Part
    sha256: str


class NativeSource:
    """Read one iteration, whatever layout wrote it. Every slice's sha256 is checked as it is read.

    Args:
        iteration: which one; None for the one that the tracker file names.

    Raises:
        UserError: no such checkpoint, an unknown version, a missing, truncated or damaged file, a missing tensor.
    """

    def __init__(self, folder: str | Path, iteration: int | None = None) -> None:
        self.folder = find_iteration(folder, iteration)
        self.location = str(self.folder)
        index = self._read_index()
        try:
            self.iteration = int(index["iteration"])
            self.config = ModelConfig.from_dict(index["model"])
            self.layout = Layout.from_dict(index["layout"])
            self._dtypes: dict[Kind, np.dtype] = {kind: DTYPES[index["kinds"][kind]] for kind in index["kinds"]}
            slices = {key: _slices(entry) for key, entry in index["tensors"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / INDEX}: damaged: {_say(error)}") from error
        self.companions = companions_of(self.folder / COMPANIONS)
        self._slices = self._here(slices) if index.get("elsewhere") else slices
        self._check_slices()
        self._files = self._open_files(elsewhere=bool(index.get("elsewhere")))

    def kinds(self) -> tuple[Kind, ...]:
        return tuple(self._dtypes)

    def dtype(self, name: str, kind: Kind = "model") -> np.dtype:
        return self._dtypes[kind]

    def read(self, name: str, kind: Kind = "model") -> np.ndarray:
        return self.read_part(name, Part.whole(self._table[name].shape), kind)

    def read_part(self, name: str, part: Part, kind: Kind = "model") -> np.ndarray:
        """Reads the slices that `part` overlaps, and no others; each whole, for its sha256."""
        values = np.empty(part.shape, self._dtypes[kind])
        for entry in self._overlapping(name, kind, part):
            first = 0
            for rows in self._stream_slice(name, kind, entry):
                transfer(rows, entry.part.rows(first, first + len(rows)), values, part)
                first += len(rows)
        return values

    def stream(self, name: str, part: Part, kind: Kind = "model") -> Iterator[np.ndarray]:
        needed = self._overlapping(name, kind, part)
        if [entry.part.shape for entry in needed] == [part.shape]:  # they are the same
            yield from self._stream_slice(name, kind, needed[0])
        else:
            yield self.read_part(name, part, kind)

    def document(self, name: str) -> str:
        """A text file that the trainer stored with the checkpoint.

        Raises:
            UserError: it is not there: the checkpoint was not written by a trainer.
        """
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{self.folder} has no {name}: it was written by a conversion, not by a training run")
        return path.read_text(encoding="utf-8")

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no {INDEX}: not a native checkpoint") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged: {error}") from error
        if not isinstance(index, dict):
            raise UserError(f"{path}: damaged: holds {type(index).__name__}, not a JSON object")
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise UserError(
                f"{path}: format {index.get('format')!r} version {index.get('version')!r}; this release reads "
                f"{FORMAT!r} version {VERSION}"
            )
        return index

    def _check_slices(self) -> None:
        """The index names every tensor, and the slices of each cover it."""
        self._table = tensor_table(self.config)
        expected = {key_of(name, kind): spec for kind in self.kinds() for name, spec in self._table.items()}
        check_names(self.location, set(self._slices), set(expected))
        for key, spec in expected.items():
            if not tiles((entry.part for entry in self._slices[key]), spec.shape):
                raise UserError(
                    f"{self.folder / INDEX}: damaged: the slices of {key} do not cover its shape {list(spec.shape)}"
                )

    def _here(self, slices: dict[str, list[_Slice]]) -> dict[str, list[_Slice]]:
        """Of slices that several machines hold, the one that is here, if any."""
        files = {entry.file for entries in slices.values() for entry in entries}
        present = {file for file in files if (self.folder / file).exists()}
        chosen: dict[str, dict[Part, _Slice]] = {key: {} for key in slices}
        for key, entries in slices.items():
            for entry in entries:
                if entry.file in present or entry.part not in chosen[key]:
                    chosen[key][entry.part] = entry
        return {key: list(found.values()) for key, found in chosen.items()}

    def _open_files(self, *, elsewhere: bool) -> dict[str, SafetensorsFile]:
        """The files that are here; with `elsewhere`, other machines hold the rest."""
        paths = {entry.file: self.folder / entry.file for entries in self._slices.values() for entry in entries}
        return {name: SafetensorsFile(path) for name, path in paths.items() if not elsewhere or path.exists()}

    def _overlapping(self, name: str, kind: Kind, part: Part) -> list[_Slice]:
        return [entry for entry in self._slices[key_of(name, kind)] if overlaps(entry.part, part)]

    def _stream_slice(self, name: str, kind: Kind, entry: _Slice) -> Iterator[np.ndarray]:
        """A slice in blocks of rows; after the last one its sha256 is known, and checked."""
        key, digest = key_of(name, kind), hashlib.sha256()
        file = self._file_of(key, entry, self._dtypes[kind])
        shape = entry.part.shape
        for first, last in row_blocks(shape, self._dtypes[kind]):
            rows = file.read(key, ((first, last), *((0, size) for size in shape[1:])))
            digest.update(_bytes(rows))
            yield rows
        if digest.hexdigest() != entry.sha256:
            raise UserError(f"{file.path}: tensor {key} is damaged: its sha256 differs from the one in {INDEX}")

    def _file_of(self, key: str, entry: _Slice, dtype: np.dtype) -> SafetensorsFile:
        """The file that holds a slice, after what its header says was compared with the index."""
        if entry.file not in self._files:
            raise UserError(
                f"{self.folder}: tensor {key} is in {entry.file}, which another machine holds: the checkpoint was "
                f"saved with --no-shared-storage; copy that folder here, too"
            )
        file = self._files[entry.file]
        if key not in file.entries:
            raise UserError(f"{file.path}: tensor {key} is missing; {INDEX} says it is there")
        check_shape(str(file.path), key, file.entries[key].shape, entry.part.shape)
        if (found := file.entries[key].dtype) != dtype:
            raise UserError(f"{file.path}: tensor {key} is of {found}; {INDEX} says {dtype}")
        return file


def _slices(entry: dict[str, Any]) -> list[_Slice]:
    """What the index says of one tensor."""
    found = []
    for item in entry["slices"]:
        boxes = tuple(tuple((int(start), int(stop)) for start, stop in box) for box in item["boxes"])
        found.append(_Slice(str(item["file"]), Part(boxes, int(entry["stacked_dim"])), item["sha256"]))
    return found


def prompt_text(source: TensorSource) -> str | None:
    """What a fine-tuned checkpoint says of its template, as it stands there; None for any other source."""
    if not isinstance(source, NativeSource) or not (source.folder / PROMPT_FILE).exists():
        return None
    return source.document(PROMPT_FILE)


def prompt_entry(source: TensorSource) -> dict[str, Any] | None:
    """The same, read."""
    text = prompt_text(source)
    entry: dict[str, Any] | None = None if text is None else json.loads(text)
    return entry
