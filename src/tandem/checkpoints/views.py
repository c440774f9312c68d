"""Sources with changed weights: in another dtype, without their last layers, or with more rows for tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tandem.checkpoints.formats.arrays import is_finite, row_blocks
from tandem.checkpoints.interface import DTYPES, TensorKind, TensorSource
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, OUTPUT, tensor_table
from tandem.parallel.slices import Part


class View(TensorSource):
    """A source that passes on another one, except what a subclass changes. Its tensors differ from those in files."""

    def __init__(self, source: TensorSource) -> None:
        self.config, self.companions, self.location = source.config, source.companions, source.location
        self.format, self.folder, self.iteration = source.format, source.folder, source.iteration
        self.layout, self.notices = source.layout, source.notices
        self._source = source

    def of(self, source: TensorSource) -> TensorSource:
        """The same view of another source."""
        raise NotImplementedError

    def kinds(self) -> tuple[TensorKind, ...]:
        return self._source.kinds()

    def kinds_of(self, name: str) -> tuple[TensorKind, ...]:
        return self._source.kinds_of(name)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._source.dtype(name, kind)

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self._source.read(name, kind)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return self._source.read_part(name, part, kind)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        return self._source.stream(name, part, kind)

    def document(self, name: str) -> str | None:
        return self._source.document(name)

    def trainer_state(self) -> tuple[str, ...]:
        return self._source.trainer_state()

    def unread_optimizer(self) -> tuple[str, ...]:
        return self._source.unread_optimizer()

    def earlier(self) -> TensorSource | None:
        source = self._source.earlier()
        return None if source is None else self.of(source)


class Cast(View):
    """The weights of a source, in another dtype.

    Raises:
        UserError: on reading, a tensor holds numbers beyond the dtype's range.
    """

    def __init__(self, source: TensorSource, dtype: str) -> None:
        super().__init__(source)
        self._dtype = DTYPES[dtype]
        self.hf_folder = source.hf_folder  # transformers casts as it reads

    def of(self, source: TensorSource) -> Cast:
        return Cast(source, self._dtype.name)

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def kinds_of(self, name: str) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self._cast(name, super().read(name, kind))

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return self._cast(name, super().read_part(name, part, kind))

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        return (self._cast(name, rows) for rows in self._source.stream(name, part, kind))

    def _cast(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if tensor.dtype.name == self._dtype.name:
            return tensor
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            cast = tensor.astype(self._dtype)
        if not is_finite(cast) and is_finite(tensor):
            raise UserError(
                f"{self.location}: tensor {name} holds numbers beyond the range of {self._dtype.name}: "
                f"choose another --params-dtype"
            )
        return cast


class FirstLayers(View):
    """The model of a source, with its first layers only, for debugging."""

    def __init__(self, source: TensorSource, num_layers: int) -> None:
        super().__init__(source)
        if not 1 <= num_layers <= source.config.num_layers:
            raise UserError(f"--num-layers {num_layers}: {source.location} has {source.config.num_layers} layers")
        self.config = replace(source.config, num_layers=num_layers)

    def of(self, source: TensorSource) -> FirstLayers:
        return FirstLayers(source, self.config.num_layers)


class Described(View):
    """A source under another config, which must imply the same tensors."""

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        super().__init__(source)
        self.config = config

    def of(self, source: TensorSource) -> Described:
        return Described(source, self.config)


class FirstRows(View):
    """The model of a source with fewer rows in its embedding and its output head: the first ones."""

    def __init__(self, source: TensorSource, rows: int) -> None:
        super().__init__(source)
        self.config = replace(source.config, vocab_size=rows)

    def of(self, source: TensorSource) -> FirstRows:
        return FirstRows(source, self.config.vocab_size)

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        tensor = super().read(name, kind)
        return tensor[: self.config.vocab_size] if name in (EMBEDDING, OUTPUT) else tensor


class LargerVocabulary(View):
    """The model of a source with more rows in its embedding and its output head.

    Each new row is the mean of the others. So a new token begins as an average one, and is not drawn much more often
    than others.

    Raises:
        UserError: the source has as many rows already, or more.
    """

    def __init__(self, source: TensorSource, rows: int) -> None:
        super().__init__(source)
        self._before = source.config.vocab_size
        if rows <= self._before:
            raise UserError(
                f"--resize-vocab {rows}: {source.location} has {self._before} rows; expected more: rows are added, and "
                f"none is dropped"
            )
        self.config = replace(source.config, vocab_size=rows)
        self._table = tensor_table(self.config)
        self._means: dict[tuple[str, TensorKind], np.ndarray] = {}

    def of(self, source: TensorSource) -> LargerVocabulary:
        return LargerVocabulary(source, self.config.vocab_size)

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self.read_part(name, Part.whole(self._table[name].shape), kind)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        if name not in (EMBEDDING, OUTPUT):
            return super().read_part(name, part, kind)
        (((first, last), columns),) = part.boxes  # split along rows, so the part is one box
        there, new = min(last, self._before), last - max(first, self._before)
        blocks = []
        if first < there:
            blocks.append(super().read_part(name, Part((((first, there), columns),)), kind))
        if new > 0:
            blocks.append(np.tile(self._mean(name, kind)[slice(*columns)], (new, 1)))
        return np.concatenate(blocks)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        if name not in (EMBEDDING, OUTPUT):
            yield from super().stream(name, part, kind)
            return
        for first, last in row_blocks(part.shape, self.dtype(name, kind)):
            yield self.read_part(name, part.rows(first, last), kind)

    def _mean(self, name: str, kind: TensorKind) -> np.ndarray:
        """The mean row of the source, [hidden], summed in fp64."""
        if (name, kind) not in self._means:
            shape = (self._before, *self._table[name].shape[1:])
            blocks = self._source.stream(name, Part.whole(shape), kind)
            total = sum(block.astype(np.float64).sum(axis=0) for block in blocks)
            self._means[name, kind] = (total / self._before).astype(self.dtype(name, kind))
        return self._means[name, kind]
