"""Random weights as a source.

Each tensor depends only on the seed and its name, so every layout and both backends start from the same bits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

from tandem.checkpoints.interface import DTYPES, RANDOM, Companions, TensorKind, TensorSource
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.slices import Part, cut


class RandomSource(TensorSource):
    """Megatron's initialisation: normal(0, init_method_std), norms at one, biases at zero.

    The projections that write to the residual stream (`linear_proj`, `linear_fc2`) are divided by sqrt(2 * num_layers).
    """

    format = RANDOM

    def __init__(
        self, config: ModelConfig, seed: int, dtype: str = "float32", companions: Companions | None = None
    ) -> None:
        self.config = config
        self.companions = companions or Companions()
        self.location = f"random weights (seed {seed})"
        self._seed = seed
        self._dtype = DTYPES[dtype]
        self._table = tensor_table(config)

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        spec = self._table[name]
        if name.endswith("layernorm.weight"):
            return np.ones(spec.shape, self._dtype)
        if name.endswith(".bias"):
            return np.zeros(spec.shape, self._dtype)
        std = self.config.init_method_std
        if "linear_proj" in name or "linear_fc2" in name:
            std /= math.sqrt(2 * self.config.num_layers)
        if not spec.split.experts:
            return self._normal(name, spec.shape, std)
        shape = (spec.shape[0] // spec.split.experts, *spec.shape[1:])
        return np.concatenate([self._normal(f"{name} {expert}", shape, std) for expert in range(spec.split.experts)])

    def _normal(self, name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, zlib.crc32(name.encode())]))
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(std)
        return values.astype(self._dtype, copy=False)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return cut(self.read(name, kind), part)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        yield self.read_part(name, part, kind)
