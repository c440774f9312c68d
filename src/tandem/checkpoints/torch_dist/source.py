"""Megatron-core's `torch_dist` checkpoints as a source of global tensors.

    latest_checkpointed_iteration.txt    a number, or "release"
    iter_0000001/ or release/
        .metadata                        which tensors there are, and where each chunk of them lies
        __0_0.distcp, __1_0.distcp...    the chunks, by the rank that wrote them
        common.pt                        `args`, and what else all ranks share; absent in plain checkpoints of torch
        metadata.json                    the name of the format; absent there, too
        hf/                              config.json and tokenizer files, if somebody put them there

Tensors are global: whatever layout wrote them, none is recorded.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.folders import TRACKER, find_iteration, iteration_of
from tandem.checkpoints.formats.rows import Rows, StoredSlice, blocks, joined
from tandem.checkpoints.formats.torch_reader import load, load_extent
from tandem.checkpoints.hf.companions import companions_in
from tandem.checkpoints.interface import (
    TORCH_DIST,
    TensorKind,
    TensorSource,
    check_recorded,
)
from tandem.checkpoints.megatron.args import described_model, numbers
from tandem.checkpoints.megatron.names import EXTRA_STATE
from tandem.checkpoints.name_lists import check_names
from tandem.checkpoints.torch_dist.metadata import METADATA, read_metadata
from tandem.checkpoints.torch_dist.names import OPTIMIZER, Home, Piece, find, model_names, prefix_of
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.slices import Part, overlaps

COMMON = "common.pt"
CONFIG = "metadata.json"
ARGS = "args"  # in common.pt, or an object of its own


def is_torch_dist(iteration: Path) -> bool:
    """Whether the folder of an iteration holds a distributed checkpoint."""
    return (iteration / METADATA).exists() or (iteration / CONFIG).exists()


class TorchDistSource(TensorSource):
    """Read the weights of one iteration. A trainer's optimizer and its random state are not read.

    Args:
        iteration: its number; None for the one that the tracker file names.
        config: the model, when the checkpoint does not describe it, or not completely: a trainer does not record the
            vocabulary before padding. Needed when there are neither `args` nor `hf/config.json`.
        noop_layers: as in `Layout`, when `args` do not record them.

    Raises:
        UserError: no such checkpoint, a file is missing or damaged, a tensor is missing, left over or of a wrong shape,
            or `args` contradict the config.
    """

    format = TORCH_DIST
    folder: Path

    def __init__(
        self,
        folder: str | Path,
        iteration: int | None = None,
        *,
        config: ModelConfig | None = None,
        noop_layers: tuple[int, ...] | None = None,
    ) -> None:
        self.folder = find_iteration(folder, iteration)
        self.iteration = iteration_of(self.folder)
        self.location = str(self.folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} does not exist: {TRACKER} or the iteration asked for names it")
        _check_backend(self.folder)
        self._contents = read_metadata(self.folder)
        self._common = _common(self.folder)
        args, where = self._args()
        recorded = numbers(args.get("noop_layers"))
        if recorded:
            check_recorded("noop_layers", noop_layers, recorded, self.location)
        self._noop_layers = noop_layers or recorded
        self.companions = companions_in(self.folder)
        self.config = described_model(args, where, config, self.companions, self._noop_layers)
        self._homes = self._find_homes()

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._homes[name].dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self.read_part(name, Part.whole(tensor_table(self.config)[name].shape), kind)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return joined(self.stream(name, part, kind), part.shape, self.dtype(name))

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        """Only the chunks that overlap `part` are read: whole, to check their CRC."""
        assert kind == "model", f"no {kind} is read from a Megatron checkpoint"
        needed = [piece for piece in self._homes[name].pieces if overlaps(Part((piece.box,)), part)]
        slices = [
            StoredSlice(Part((piece.box,)), rows)
            for _, of_chunk in groupby(needed, lambda piece: piece.chunk)
            for piece, rows in _rows_of_pieces(list(of_chunk))
        ]
        yield from blocks(part, self.dtype(name), slices)

    def trainer_state(self) -> tuple[str, ...]:
        common = {str(key) for key in self._common} - {"checkpoint_version", "iteration"}
        objects = {name.split("/")[0] for name in self._contents.objects if EXTRA_STATE not in name}
        return tuple(sorted(name for name in common | objects if name != ARGS and not OPTIMIZER.match(f"{name}.")))

    def unread_optimizer(self) -> tuple[str, ...]:
        names = (*self._contents.tensors, *self._contents.objects, *(f"{key}." for key in self._common))
        return (".distcp files",) if any(OPTIMIZER.match(name) for name in names) else ()

    def _args(self) -> tuple[dict[str, Any], str]:
        """The trainer's settings, and where they stand."""
        args, where = self._common.get(ARGS), str(self.folder / COMMON)
        if args is None and ARGS in self._contents.objects:
            args, where = load_extent(self._contents.objects[ARGS]), f"{self.folder}: {ARGS}"
        if args is not None and not isinstance(args, argparse.Namespace):
            raise UserError(f"{where}: args is a {type(args).__name__}; expected an argparse.Namespace")
        return (vars(args) if args is not None else {}), where

    def _find_homes(self) -> dict[str, Home]:
        """Name -> where the tensor is, for all tensors of the model."""
        tensors = self._contents.tensors
        prefix = prefix_of(self.location, tensors)
        rows = tensors[prefix + EMBEDDING].shape[0]
        if rows < self.config.vocab_size:
            raise UserError(
                f"{self.location}: {EMBEDDING} has {rows} rows; the config implies {self.config.vocab_size}"
            )
        slots = self._slots()
        homes: dict[str, Home] = {}
        missing: set[str] = set()
        for spec in tensor_table(replace(self.config, vocab_size=rows)).values():
            slot = None if spec.layer is None else slots[spec.layer]
            home = find(self.location, tensors, prefix, spec, slot, len(slots) + len(self._noop_layers))
            if home is None:
                missing.add(prefix + spec.name)
            else:
                homes[spec.name] = home
        used = {name for home in homes.values() for name in home.stored_names}
        check_names(self.location, model_names(tensors, prefix), used | missing)
        return homes

    def _slots(self) -> list[int]:
        """[layer] -> its number in the stack, in which noop layers count."""
        total = self.config.num_layers + len(self._noop_layers)
        return [slot for slot in range(total) if slot not in self._noop_layers]


class _RowsFrom:
    """Rows of an array, from row `first` on."""

    def __init__(self, rows: Rows, first: int) -> None:
        self._rows, self._first = rows, first

    def read(self, first: int, last: int) -> np.ndarray:
        return self._rows.read(self._first + first, self._first + last)

    def close(self) -> None:
        self._rows.close()


def _rows_of_pieces(pieces: list[Piece]) -> Iterator[tuple[Piece, Rows]]:
    """The rows of each of several pieces of one chunk. The chunk stacks them: they are read as one after the other."""
    tensor = pieces[0].tensor.open(pieces[0].chunk)
    stacked = len(pieces[0].index)
    sizes, (size, *rest) = tensor.shape[:stacked], tensor.shape[stacked:]
    rows = tensor.rows(pieces[0].tensor.name, (math.prod(sizes) * size, *rest))
    for piece in pieces:
        number = int(np.ravel_multi_index(piece.index, sizes)) if sizes else 0
        yield piece, _RowsFrom(rows, number * size)


def _check_backend(folder: Path) -> None:
    """Raise UserError for Megatron's other distributed formats, such as zarr."""
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: expected JSON with sharded_backend: {error!r}") from error
    if backend != "torch_dist":
        raise UserError(
            f"{folder} is a distributed checkpoint of the format {backend}; torch_dist and torch are read. Load it "
            f"with Megatron and save it with --ckpt-format torch_dist"
        )


def _common(folder: Path) -> dict[str, Any]:
    path = folder / COMMON
    if not path.exists():
        return {}
    content = load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected the dict that Megatron saves")
    return content
