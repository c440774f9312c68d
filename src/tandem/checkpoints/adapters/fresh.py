"""New adapters as a source. They change nothing yet."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

from tandem.checkpoints.interface import RANDOM, Companions, TensorKind, TensorSource
from tandem.models.config import ModelConfig
from tandem.models.tensors import TensorSpec, tensor_table
from tandem.parallel.slices import Part, cut


class FreshAdapters(TensorSource):
    """PEFT's initial values: A uniform within 1 / sqrt(inputs), B zero, and DoRA's magnitudes the weights' own lengths.

    A is drawn whole from the seed and its name, so every layout and both backends start from the same bits.

    Args:
        base: the weights that the adapters are for.
        config: the weights' config, with adapters.
    """

    format = RANDOM

    def __init__(self, base: TensorSource, config: ModelConfig, seed: int) -> None:
        self.config, self.companions = config, Companions()
        self.location = f"new adapters (seed {seed})"
        self._base, self._seed = base, seed
        self._table = tensor_table(config)

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        spec = self._table[name]
        assert spec.adapter is not None
        if name == spec.adapter.b:
            return np.zeros(spec.shape, np.float32)
        if name == spec.adapter.magnitude:
            return self._lengths(spec)
        generator = np.random.Generator(np.random.Philox(key=[self._seed, zlib.crc32(name.encode())]))
        values = generator.random(spec.shape, dtype=np.float32)
        values *= 2
        values -= 1
        values /= np.float32(math.sqrt(spec.shape[1]))
        return values

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return cut(self.read(name, kind), part)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        yield self.read_part(name, part, kind)

    def _lengths(self, spec: TensorSpec) -> np.ndarray:
        """The lengths of the rows that the adapter adds to."""
        assert spec.adapter is not None
        shape = self._table[spec.adapter.weight].shape
        columns = (0, shape[1])
        return np.concatenate(
            [
                np.linalg.norm(
                    self._base.read_part(spec.adapter.weight, Part(((rows, columns),))).astype(np.float32), axis=1
                )
                for rows in spec.adapter.ranges(shape[0], self.config)
            ]
        )
