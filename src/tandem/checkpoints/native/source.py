"""The native checkpoint: Megatron's folders with safetensors, and an index from which any layout can be read.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.adapters.base import BaseRecord
from tandem.checkpoints.folders import COMPANIONS, find_iteration, saved_iterations
from tandem.checkpoints.formats.rows import CheckedRows, StoredSlice, blocks, joined
from tandem.checkpoints.formats.safetensors import SafetensorsFile
from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.interface import (
    DTYPES,
    NATIVE,
    TensorKind,
    TensorSource,
    check_shape,
)
from tandem.checkpoints.name_lists import check_names
from tandem.checkpoints.native.format import FORMAT, INDEX, VERSION, in_words, key_of, stored_names
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout
from tandem.parallel.slices import Part, overlaps, tiles


@dataclass(frozen=True)
class _Slice:
    file: str
    part: Part
    sha256: str


class NativeSource(TensorSource):
    """Read one iteration, in whatever layout it was written. The sha256 of every slice that is read is checked.

    Args:
        iteration: its number; None for the one that the tracker file names.

    Raises:
        UserError: no such checkpoint, an unknown version, a missing, truncated or damaged file, a missing tensor.
    """

    format = NATIVE
    record: BaseRecord | None  # the weights of adapters, when it holds only these
    folder: Path
    iteration: int
    layout: Layout

    def __init__(self, folder: str | Path, iteration: int | None = None) -> None:
        self.folder = find_iteration(folder, iteration)
        self.location = str(self.folder)
        index = self._read_index()
        try:
            self.iteration = int(index["iteration"])
            self.config = ModelConfig.from_dict(index["model"])
            self.layout = Layout.from_dict(index["layout"])
            self._dtypes: dict[TensorKind, np.dtype] = {kind: DTYPES[index["kinds"][kind]] for kind in index["kinds"]}
            self.record = BaseRecord(**index["base"]) if "base" in index else None
            slices = {key: _slices(entry) for key, entry in index["tensors"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / INDEX}: damaged: {in_words(error)}") from error
        self.companions = companions_of(self.folder / COMPANIONS)
        self._slices = self._here(slices) if index.get("elsewhere") else slices
        self._check_slices()
        self._files = self._open_files(elsewhere=bool(index.get("elsewhere")))

    def kinds(self) -> tuple[TensorKind, ...]:
        return tuple(self._dtypes)

    def kinds_of(self, name: str) -> tuple[TensorKind, ...]:
        return tuple(kind for kind in self._dtypes if key_of(name, kind) in self._slices)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._dtypes[kind]

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self.read_part(name, Part.whole(self._table[name].shape), kind)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return joined(self.stream(name, part, kind), part.shape, self._dtypes[kind])

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        """Only slices that overlap `part` are read: whole, to check their sha256."""
        key = key_of(name, kind)
        needed = [entry for entry in self._slices[key] if overlaps(entry.part, part)]
        slices = [
            StoredSlice(entry.part, _SliceRows(self._file_of(key, entry, self._dtypes[kind]), key, entry.sha256))
            for entry in needed
        ]
        yield from blocks(part, self._dtypes[kind], slices)

    def document(self, name: str) -> str | None:
        path = self.folder / name
        try:
            return path.read_text(encoding="utf-8") if path.exists() else None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: damaged: {error}") from error

    def trainer_state(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self.folder.glob("*.*") if path.is_file() and path.name != INDEX))

    def earlier(self) -> NativeSource | None:
        for iteration in saved_iterations(self.folder.parent):
            if iteration < self.iteration:
                try:
                    return NativeSource(self.folder.parent, iteration)
                except UserError:
                    continue  # try the one before
        return None

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
        """Raise UserError unless the index has every tensor, and the slices of each cover it."""
        self._table = tensor_table(self.config)
        expected = {
            key_of(name, kind): self._table[name]
            for kind in self.kinds()
            for name in stored_names(self.config, kind, adapters_only=self.record is not None)
        }
        check_names(self.location, set(self._slices), set(expected))
        for key, spec in expected.items():
            if not tiles((entry.part for entry in self._slices[key]), spec.shape):
                raise UserError(
                    f"{self.folder / INDEX}: damaged: the slices of {key} do not cover its shape {list(spec.shape)}"
                )

    def _here(self, slices: dict[str, list[_Slice]]) -> dict[str, list[_Slice]]:
        """Of equal slices on several machines, keep one: that of this machine, if it has one."""
        files = {entry.file for entries in slices.values() for entry in entries}
        present = {file for file in files if (self.folder / file).exists()}
        chosen: dict[str, dict[Part, _Slice]] = {key: {} for key in slices}
        for key, entries in slices.items():
            for entry in entries:
                if entry.file in present or entry.part not in chosen[key]:
                    chosen[key][entry.part] = entry
        return {key: list(by_part.values()) for key, by_part in chosen.items()}

    def _open_files(self, *, elsewhere: bool) -> dict[str, SafetensorsFile]:
        """Open the files of this machine. With `elsewhere`, other machines hold the rest."""
        paths = {entry.file: self.folder / entry.file for entries in self._slices.values() for entry in entries}
        return {name: SafetensorsFile(path) for name, path in paths.items() if not elsewhere or path.exists()}

    def _file_of(self, key: str, entry: _Slice, dtype: np.dtype) -> SafetensorsFile:
        """The file that holds a slice. Its header is compared with the index first."""
        if entry.file not in self._files:
            raise UserError(
                f"{self.folder}: tensor {key} is in {entry.file}, which another machine holds: the checkpoint was "
                f"saved with --no-shared-storage; copy that folder here, too"
            )
        file = self._files[entry.file]
        if key not in file.entries:
            raise UserError(f"{file.path}: tensor {key} is missing; {INDEX} lists it")
        check_shape(str(file.path), key, file.entries[key].shape, entry.part.shape)
        if (stored := file.entries[key].dtype) != dtype:
            raise UserError(f"{file.path}: tensor {key} is {stored}; {INDEX} says {dtype}")
        return file


class _SliceRows(CheckedRows):
    """Rows of a slice, whose sha256 the index records."""

    def __init__(self, file: SafetensorsFile, key: str, sha256: str) -> None:
        self._file, self._key, self._sha256 = file, key, sha256
        self._digest = hashlib.sha256()
        super().__init__(file.entries[key].shape, file.entries[key].dtype)

    def _load(self, first: int, last: int) -> np.ndarray:
        return self._file.read(self._key, ((first, last), *((0, size) for size in self._shape[1:])))

    def _begin(self) -> None:
        self._digest = hashlib.sha256()

    def _add(self, data: memoryview) -> None:
        self._digest.update(data)

    def _check(self) -> None:
        if self._digest.hexdigest() != self._sha256:
            raise UserError(
                f"{self._file.path}: tensor {self._key} is damaged: its sha256 differs from the one in {INDEX}"
            )


def _slices(entry: dict[str, Any]) -> list[_Slice]:
    """The slices of one tensor, from its entry in the index."""
    slices = []
    for item in entry["slices"]:
        boxes = tuple(tuple((int(start), int(stop)) for start, stop in box) for box in item["boxes"])
        slices.append(_Slice(str(item["file"]), Part(boxes, int(entry["stacked_dim"])), item["sha256"]))
    return slices
