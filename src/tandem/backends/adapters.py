"""What the adapters of both frameworks share: where they are on a rank, and which numbers dropout drops."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tandem.backends.passes import WeightedBatch
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.rows import Ranges
from tandem.parallel.layout import Shard


@dataclass(frozen=True)
class LocalAdapter:
    """An adapter on a rank.

    Attributes:
        module: its name among the adapters of a linear layer.
        ranges: the rows of the rank's slice of the weight that it adds to; of experts, of the slice of each one.
        a, b, magnitude: the global names of its tensors.
    """

    module: str
    rank: int
    scale: float
    ranges: Ranges
    a: str
    b: str
    magnitude: str

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in self.ranges]


def local_adapters(shards: Mapping[str, Shard], config: ModelConfig) -> dict[str, list[LocalAdapter]]:
    """The adapters of a rank, by the global name of the weight that they add to.

    Args:
        shards: what the rank holds, by global name.
        config: with the sizes of this rank's slices.
    """
    found: dict[str, list[LocalAdapter]] = {}
    for name, shard in shards.items():
        adapter = shard.spec.adapter
        if adapter is not None and name == adapter.a:
            matrices = shard.shape[0] // adapter.rank
            ranges = adapter.ranges(shards[adapter.weight].shape[0] // matrices, config)
            names = (adapter.a, adapter.b, adapter.magnitude)
            local = LocalAdapter(adapter.module, adapter.rank, adapter.scale, ranges, *names)
            found.setdefault(adapter.weight, []).append(local)
    return found


@dataclass
class Switch:
    """Whether adapters take part in passes. All adapters of a rank share it."""

    on: bool = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside this context they take no part."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


@dataclass(frozen=True)
class Dropout:
    """Which numbers of adapters' inputs a step drops in a micro-batch: the same on every layout and framework.

    Attributes:
        share: of the numbers that are dropped.
        step: the updates before this one.
        batch: a number that depends on the micro-batch's tokens.
    """

    share: float
    step: int
    batch: int

    @classmethod
    def of(cls, lora: Lora | None, batch: MicroBatch) -> Dropout | None:
        """None where nothing is dropped: without dropout, and in evaluation."""
        if lora is None or not lora.lora_dropout or not isinstance(batch, WeightedBatch):
            return None
        tokens = np.ascontiguousarray(batch.tokens, dtype=np.int32)
        return cls(lora.lora_dropout, batch.step, zlib.crc32(tokens.data))

    def factors(self, adapted: str, tokens: int, features: int, rank: int, ranks: int) -> np.ndarray:
        """What to multiply an input with: 0 where a number is dropped, else 1 / (1 - share).

        Args:
            adapted: the global name of the weight.
            features: of the input on this rank, which is number `rank` of the `ranks` that hold equal parts.

        Returns:
            fp32 [tokens, features].
        """
        seed = np.random.SeedSequence([self.step, self.batch, zlib.crc32(adapted.encode())])
        values = np.random.Generator(np.random.Philox(seed)).random((tokens, features * ranks), np.float32)
        kept = values[:, rank * features : (rank + 1) * features] >= self.share
        return kept.astype(np.float32) / np.float32(1 - self.share)
