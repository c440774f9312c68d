"""Sources with changed weights: in another dtype, or without their last layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.interface import DTYPES, TensorKind, TensorSource
from tandem.errors import UserError
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
