"""Sources seen differently: in another dtype, or without their last layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.interface import DTYPES, Kind, TensorSource
from tandem.errors import UserError
from tandem.parallel.slices import Part


class Cast:
    """The weights of a source, in another dtype.

    Raises:
        UserError: on reading, a tensor holds numbers beyond the dtype's range.
    """

    def __init__(self, source: TensorSource, dtype: str) -> None:
        self.config, self.companions, self.location = source.config, source.companions, source.location
        self._source, self._dtype = source, DTYPES[dtype]

    def kinds(self) -> tuple[Kind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: Kind = "model") -> np.dtype:
        return self._dtype

    def read(self, name: str, kind: Kind = "model") -> np.ndarray:
        return self._cast(name, self._source.read(name, kind))

    def read_part(self, name: str, part: Part, kind: Kind = "model") -> np.ndarray:
        return self._cast(name, self._source.read_part(name, part, kind))

    def stream(self, name: str, part: Part, kind: Kind = "model") -> Iterator[np.ndarray]:
        return (self._cast(name, rows) for rows in self._source.stream(name, part, kind))

    def _cast(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if tensor.dtype.name == self._dtype.name:
            return tensor
        with np.errstate(over="ignore"):  # found, and named, below
            cast = tensor.astype(self._dtype)
        if not is_finite(cast) and is_finite(tensor):
            raise UserError(
                f"{self.location}: tensor {name} holds numbers beyond the range of {self._dtype.name}: "
                f"choose another --params-dtype"
            )
        return cast


class FirstLayers:
    """A source's model cut off after its first layers, for debugging."""

    def __init__(self, source: TensorSource, num_layers: int) -> None:
        if not 1 <= num_layers <= source.config.num_layers:
            raise UserError(f"--num-layers {num_layers}: {source.location} has {source.config.num_layers} layers")
        self.config = replace(source.config, num_layers=num_layers)
        self.companions, self.location = source.companions, source.location
        self._source = source

    def kinds(self) -> tuple[Kind, ...]:
        return self._source.kinds()

    def dtype(self, name: str, kind: Kind = "model") -> np.dtype:
        return self._source.dtype(name, kind)

    def read(self, name: str, kind: Kind = "model") -> np.ndarray:
        return self._source.read(name, kind)

    def read_part(self, name: str, part: Part, kind: Kind = "model") -> np.ndarray:
        return self._source.read_part(name, part, kind)

    def stream(self, name: str, part: Part, kind: Kind = "model") -> Iterator[np.ndarray]:
        return self._source.stream(name, part, kind)
