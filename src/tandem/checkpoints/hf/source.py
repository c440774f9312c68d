"""Hugging Face folders as a source of global tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem.checkpoints.formats.arrays import row_blocks, same_bits
from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.hf.prefixes import BODY, prefix_of, without_prefix
from tandem.checkpoints.hf.weights import open_weights, unread_weights
from tandem.checkpoints.interface import HUGGING_FACE, TensorKind, TensorSource, check_shape, dtype_name
from tandem.checkpoints.name_lists import check_names
from tandem.errors import UserError
from tandem.models.hf_config import from_hf
from tandem.models.rows import Ranges
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.models.weight_map import HF_EMBEDDING, LM_HEAD, WeightMap
from tandem.parallel.slices import Box, Part

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT


class HFSource(TensorSource):
    """Global tensors out of a Hugging Face folder: `.safetensors` or `pytorch_model*.bin`, single or sharded.

    The names and shapes of tensors are checked against the config when the folder is opened. Names may have a common
    prefix. A tied model may hold an `lm_head`, which must then equal the embedding.

    Raises:
        UserError: no weights, or a tensor is missing, left over, of a wrong shape, or of an unsupported dtype.
    """

    format = HUGGING_FACE
    folder: Path

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self.companions = companions_of(folder)
        self.config = from_hf(self.companions.hf_config or {}, where=str(self.folder / "config.json"))
        self._map = WeightMap(self.config)
        self._table = tensor_table(self.config)
        stored = open_weights(self.folder)
        prefix = prefix_of(stored)
        self._stored = stored if prefix in (None, BODY) else without_prefix(stored, prefix)
        # transformers adds a missing `model.` itself, and takes no other prefix. With PEFT it follows an adapter.
        reads_alike = prefix in (BODY, "") and not (self.folder / ADAPTER_CONFIG).exists()
        self.hf_folder = self.folder if reads_alike else None
        self.notices = tuple(self._notices(prefix, unread_weights(self.folder, stored)))
        self._check()

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        first = next(iter(self._map.rows[name]))
        return self._stored[first].entry.dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self.read_part(name, Part.whole(self._table[name].shape), kind)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        """From safetensors, only the rows and columns of `part` are read."""
        boxes = [self._read_box(name, box) for box in part.boxes]
        return boxes[0] if len(boxes) == 1 else np.concatenate(boxes, axis=part.dim)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        """Blocks stay in the processor's cache, where the files allow to read parts. Else they are whole tensors."""
        if all(self._stored[hf].file.partial for hf in self._map.rows[name]):
            for first, last in row_blocks(part.shape, self.dtype(name)):
                yield self.read_part(name, part.rows(first, last), kind)
        else:
            for piece in _pieces(part, self._map.rows[name].values()):
                yield self.read_part(name, piece, kind)

    def _read_box(self, name: str, box: Box) -> np.ndarray:
        shape = tuple(stop - start for start, stop in box)
        values = np.empty(shape, self.dtype(name))  # takes no memory until it is filled
        for hf, ranges in self._map.rows[name].items():
            if ranges[0][0] >= box[0][1] or ranges[-1][1] <= box[0][0]:
                continue  # of hundreds of experts, a block of rows is of one
            moves = _moves(ranges, *box[0])
            if not moves:
                continue
            first, last = moves[0].start, moves[-1].stop
            rows = self._stored[hf].read(((first, last), *box[1:]))
            if rows.shape == shape:
                values = rows
                break
            for move in moves:
                values[move.target : move.target + move.rows] = rows[move.start - first : move.stop - first]
        if name == EMBEDDING and self.config.tied and LM_HEAD in self._stored:
            self._check_tied_head(values, box)
        return values

    def _check(self) -> None:
        names = {name for name in self._stored if not name.endswith("rotary_emb.inv_freq")}
        expected = self._map.hf_shapes()
        check_names(self.location, names - ({LM_HEAD} if self.config.tied else set()), set(expected))
        for name, shape in expected.items():
            tensor = self._stored[name]
            check_shape(str(tensor.file.path), name, tensor.entry.shape, shape)
        for parts in self._map.rows.values():
            dtypes = {dtype_name(self._stored[part].entry.dtype) for part in parts}
            if len(dtypes) > 1:
                raise UserError(f"{self.location}: {', '.join(parts)} must have one dtype, and have {sorted(dtypes)}")

    def _notices(self, prefix: str | None, unread: list[str]) -> Iterator[str]:
        if prefix not in (None, BODY):
            yield f"{self.folder}: the names of tensors begin with {prefix!r} in place of {BODY!r}; they are read so"
        if unread:
            yield f"{self.folder}: not read, as transformers does not: {', '.join(unread)}"
        if (self.folder / ADAPTER_CONFIG).exists():
            yield (
                f"{self.folder}: {ADAPTER_CONFIG} is not read: the weights are taken as they are, without an adapter; "
                f"transformers with PEFT loads the adapter on another model instead"
            )

    def _check_tied_head(self, embedding: np.ndarray, box: Box) -> None:
        head = self._stored[LM_HEAD].read(box)
        if head.dtype != embedding.dtype or head.shape != embedding.shape or not same_bits(head, embedding):
            raise UserError(
                f"{self._stored[LM_HEAD].file.path}: config.json sets tie_word_embeddings, but {LM_HEAD} differs from "
                f"{HF_EMBEDDING}: set tie_word_embeddings to false if the model has a separate head"
            )


def _pieces(part: Part, tensors: Iterable[Ranges]) -> Iterator[Part]:
    """`part` of an mcore tensor, cut between the Hugging Face tensors that it is made of.

    Those whose rows take turns stay together.

    >>> [piece.boxes for piece in _pieces(Part.whole((6,)), [((0, 2),), ((2, 3), (4, 6)), ((3, 4),)])]
    [(((0, 2),),), (((2, 6),),)]
    """
    spans: list[tuple[int, int]] = []
    for start, stop in sorted((ranges[0][0], ranges[-1][1]) for ranges in tensors):
        if spans and start < spans[-1][1]:
            start, stop = spans[-1][0], max(stop, spans.pop()[1])
        spans.append((start, stop))
    for start, stop in spans:
        boxes = [((max(box[0][0], start), min(box[0][1], stop)), *box[1:]) for box in part.boxes]
        if there := tuple(box for box in boxes if box[0][0] < box[0][1]):
            yield Part(there, part.dim)


@dataclass(frozen=True)
class _Move:
    """Rows `start` to `stop` of a Hugging Face tensor, and the number of their first row in the result."""

    start: int
    stop: int
    target: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def _moves(ranges: Ranges, first: int, last: int) -> list[_Move]:
    """The rows of a Hugging Face tensor that are among rows `first` to `last` of an mcore tensor.

    `ranges` are the rows of the mcore tensor that the Hugging Face tensor is made of.

    >>> _moves(((0, 2), (4, 6)), 1, 5)
    [_Move(start=1, stop=2, target=0), _Move(start=2, stop=3, target=3)]
    """
    moves, hf_row = [], 0
    for start, stop in ranges:
        low, high = max(start, first), min(stop, last)
        if low < high:
            moves.append(_Move(hf_row + low - start, hf_row + high - start, low - first))
        hf_row += stop - start
    return moves
