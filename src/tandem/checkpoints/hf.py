"""Hugging Face folders as a source and as a sink."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem.checkpoints.arrays import row_blocks, same_bits
from tandem.checkpoints.hf_weights import INDEX, SINGLE, TORCH_INDEX, open_weights
from tandem.checkpoints.interface import DTYPES, Companions, Kind, RowsWritten, check_names, check_shape, dtype_name
from tandem.checkpoints.publish import Publication, check_free_space
from tandem.checkpoints.safetensors_file import SafetensorsWriter
from tandem.errors import UserError
from tandem.models.config import ModelConfig, from_hf, load_hf_config, to_hf
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.models.weight_map import HF_EMBEDDING, LM_HEAD, Ranges, WeightMap
from tandem.parallel.slices import Box, Part

COMPANION_PATTERNS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def companion_files(folder: str | Path) -> list[Path]:
    """The small files of a Hugging Face folder beside its config and weights: tokenizer, template, generation."""
    files = {path for pattern in COMPANION_PATTERNS for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(path for path in files if path.name not in ("config.json", INDEX, TORCH_INDEX))


def companions_of(folder: str | Path) -> Companions:
    """The config and the companion files of a Hugging Face folder."""
    return Companions(load_hf_config(folder), companion_files(folder))


def write_companions(folder: Path, companions: Companions, config: ModelConfig, dtype: str) -> None:
    """Write `config.json` and copy the tokenizer files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = to_hf(config, companions.hf_config, dtype)
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    for path in companions.files:
        shutil.copyfile(path, folder / path.name)
    for name, text in companions.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


class HFSource:
    """Global tensors out of a Hugging Face folder: `.safetensors` or `pytorch_model*.bin`, single or sharded.

    The tensors' names and shapes are checked against the config at once. A tied model may carry an `lm_head`; it
    must then equal the embedding.

    Raises:
        UserError: no weights, or a tensor is missing, left over, mis-shaped, or of an unsupported dtype.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self.companions = companions_of(folder)
        self.config = from_hf(self.companions.hf_config or {}, where=str(self.folder / "config.json"))
        self._map = WeightMap(self.config)
        self._table = tensor_table(self.config)
        self._files = open_weights(self.folder)
        self._check()

    def kinds(self) -> tuple[Kind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: Kind = "model") -> np.dtype:
        first = next(iter(self._map.rows[name]))
        return self._files[first].entries[first].dtype

    def read(self, name: str, kind: Kind = "model") -> np.ndarray:
        return self.read_part(name, Part.whole(self._table[name].shape), kind)

    def read_part(self, name: str, part: Part, kind: Kind = "model") -> np.ndarray:
        """Of safetensors, reads the rows and columns of `part` and no others."""
        boxes = [self._read_box(name, box) for box in part.boxes]
        return boxes[0] if len(boxes) == 1 else np.concatenate(boxes, axis=part.dim)

    def stream(self, name: str, part: Part, kind: Kind = "model") -> Iterator[np.ndarray]:
        """In blocks that stay in the processor's cache, where the files let parts be read."""
        if all(self._files[hf].partial for hf in self._map.rows[name]):
            for first, last in row_blocks(part.shape, self.dtype(name)):
                yield self.read_part(name, part.rows(first, last), kind)
        else:
            yield self.read_part(name, part, kind)

    def _read_box(self, name: str, box: Box) -> np.ndarray:
        shape = tuple(stop - start for start, stop in box)
        values = np.empty(shape, self.dtype(name))  # costs nothing until it is filled
        for hf, ranges in self._map.rows[name].items():
            moves = _moves(ranges, *box[0])
            if not moves:
                continue
            first, last = moves[0].start, moves[-1].stop
            found = self._files[hf].read(hf, ((first, last), *box[1:]))
            if found.shape == shape:
                values = found
                break
            for move in moves:
                values[move.target : move.target + move.rows] = found[move.start - first : move.stop - first]
        if name == EMBEDDING and self.config.tied and LM_HEAD in self._files:
            self._check_tied_head(values, box)
        return values

    def _check(self) -> None:
        found = {name for name in self._files if not name.endswith("rotary_emb.inv_freq")}
        expected = self._map.hf_shapes()
        check_names(self.location, found - ({LM_HEAD} if self.config.tied else set()), set(expected))
        for name, shape in expected.items():
            file = self._files[name]
            check_shape(str(file.path), name, file.entries[name].shape, shape)
        for parts in self._map.rows.values():
            dtypes = {dtype_name(self._files[part].entries[part].dtype) for part in parts}
            if len(dtypes) > 1:
                raise UserError(f"{self.location}: {', '.join(parts)} must be of one dtype, not {sorted(dtypes)}")

    def _check_tied_head(self, embedding: np.ndarray, box: Box) -> None:
        head = self._files[LM_HEAD].read(LM_HEAD, box)
        if head.dtype != embedding.dtype or head.shape != embedding.shape or not same_bits(head, embedding):
            raise UserError(
                f"{self._files[LM_HEAD].path}: config.json says tie_word_embeddings, but {LM_HEAD} differs from "
                f"{HF_EMBEDDING}: set tie_word_embeddings to false if the head is one of its own"
            )


class HFSink:
    """A Hugging Face folder that `from_pretrained` loads: safetensors of at most `shard_bytes`, config, tokenizer.

    Tensors must come in the tensor table's order.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        dtype: str,
        companions: Companions,
        shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self._config, self._dtype, self._companions = config, dtype, companions
        self._map = WeightMap(config)
        self._shards = self._plan(shard_bytes)
        self._total = sum(math.prod(shape) for shape in self._map.hf_shapes().values()) * DTYPES[dtype].itemsize
        check_free_space(self.folder, self._total)
        self._publication = Publication(self.folder)
        self._open: SafetensorsWriter | None = None
        self._table = tensor_table(config)
        self._names, self._written = list(self._table), 0
        self._rows, self._blocks = RowsWritten(), list[np.ndarray]()

    def write(self, name: str, rows: np.ndarray, kind: Kind = "model") -> None:
        assert kind == "model", f"a Hugging Face folder holds no {kind}"
        assert name == self._names[self._written], f"{name} written where {self._names[self._written]} was due"
        shape = self._table[name].shape
        written = self._rows.add(name, rows, shape)
        self._blocks.append(rows)  # its rows belong to several tensors in turn
        if written.stop < shape[0]:
            return
        tensor = self._blocks[0] if len(self._blocks) == 1 else np.concatenate(self._blocks)
        for hf_name, part in self._map.to_hf(name, tensor).items():
            self._writer_for(hf_name).write(hf_name, part)
        self._blocks.clear()
        self._written += 1

    def close(self) -> None:
        if self._written != len(self._names):
            raise UserError(f"{self.folder}: {self._names[self._written]} was never written")
        assert self._open is not None
        self._open.close()
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._publication.work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_companions(self._publication.work, self._companions, self._config, self._dtype)
        self._publication.commit()

    def abort(self) -> None:
        if self._open is not None:
            self._open.abort()
        self._publication.abort()

    def _plan(self, shard_bytes: int) -> dict[str, list[str]]:
        """File name -> the tensors it will hold."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, shape in self._map.hf_shapes().items():
            nbytes = math.prod(shape) * DTYPES[self._dtype].itemsize
            if groups[-1] and size + nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += nbytes
        if len(groups) == 1:
            return {SINGLE: groups[0]}
        return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}

    def _writer_for(self, hf_name: str) -> SafetensorsWriter:
        file = next(file for file, names in self._shards.items() if hf_name in names)
        if self._open is None or self._open.path.name != file:
            if self._open is not None:
                self._open.close()
            shapes = self._map.hf_shapes()
            entries = {name: (DTYPES[self._dtype], shapes[name]) for name in self._shards[file]}
            self._open = SafetensorsWriter(self._publication.work / file, entries, {"format": "pt"})
        return self._open


@dataclass(frozen=True)
class _Move:
    """Rows `start` to `stop` of a Hugging Face tensor, and the first of the rows they become."""

    start: int
    stop: int
    target: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def _moves(ranges: Ranges, first: int, last: int) -> list[_Move]:
    """Which rows of the tensor that stacks `ranges` of an mcore tensor are among its rows `first` to `last`."""
    moves, own = [], 0
    for start, stop in ranges:
        low, high = max(start, first), min(stop, last)
        if low < high:
            moves.append(_Move(own + low - start, own + high - start, low - first))
        own += stop - start
    return moves
