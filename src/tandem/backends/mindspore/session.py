"""Keys and values that are kept, and the steps of a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor

from tandem.backends.loss import chunks
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.passes import Passes
from tandem.backends.mindspore.weight import Pullback
from tandem.backends.session import Kept
from tandem.data.batch import MicroBatch
from tandem.frameworks import MINDSPORE
from tandem.models.config import ModelConfig

Cache = Any  # layer, keys or values, group, token, channel; an array or a tensor, as the kernels have it


@dataclass(frozen=True)
class MindSporeSession:
    """`tandem.backends.session.Computes` on MindSpore.

    Attributes:
        config: with the sizes of this rank's slices.
        vocab_size: of the whole vocabulary.
    """

    passes: Passes
    everyone: Ranks
    config: ModelConfig
    vocab_size: int

    @property
    def ranks(self) -> int:
        return self.everyone.size

    @property
    def leads(self) -> bool:
        return self.everyone.rank == 0

    def new_cache(self, room: int) -> Cache:
        config = self.config
        shape = (config.num_layers, 2, config.num_query_groups, room, config.kv_channels)
        return self.passes.kernels.new_cache(shape, self.passes.dtype)

    def copied(self, cache: Cache, room: int, tokens: int) -> Cache:
        new = self.new_cache(room)
        new[:, :, :, :tokens] = cache[:, :, :, :tokens]
        return new

    def compute(self, batch: MicroBatch, kept: Sequence[Kept[Cache]], rows: np.ndarray) -> Iterator[np.ndarray]:
        def attend(layer: int, *inputs: Any, **others: Any) -> tuple[Tensor, Pullback]:
            return self.passes.kernels.attention_over_kept(layer, *inputs, **others, kept=kept), _never

        with np.errstate(all="ignore"):
            hidden = self.passes.hidden(batch, rows, attend)
        size = self.passes.tensor.vocabulary_rows
        return (self._logits(hidden, part) for part in chunks(len(rows), size, MINDSPORE.logits_chunk_bytes))

    def _logits(self, hidden: Tensor, part: slice) -> np.ndarray:
        kernels = self.passes.kernels
        rows = kernels.rows(hidden, part.start, part.stop)
        logits = kernels.product(rows, self.passes.decoder.head.value, transpose_b=True)
        return self.passes.tensor.gather_vocabulary(logits, self.vocab_size)

    def from_first(self, value: Any) -> Any:
        return self.everyone.gather_values(value)[0]


def _never(gradient: Tensor) -> Tensor:
    raise AssertionError("sessions are not differentiated")
