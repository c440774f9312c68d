"""Keys and values that are kept, and the steps of a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.loss import chunks
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.passes import Passes
from tandem.backends.mindspore.weight import Pullback
from tandem.backends.session import Kept, Wanted
from tandem.data.batch import MicroBatch
from tandem.frameworks import MINDSPORE
from tandem.models.config import ModelConfig

# By layer: keys or values, group, token, channel; an array or a tensor, as the kernels have it.
Cache = dict[int, Any]


@dataclass(frozen=True)
class MindSporeSession:
    """`tandem.backends.session.Computes` on MindSpore.

    Attributes:
        model_ranks: those that hold the model together.
        local: the config with the sizes of this rank's slices.
        layers: those on this rank, by their number in the whole model.
        sharers, sharer: of the data ranks that share experts, how many there are and which one this is.
        vocab_size: of the whole vocabulary.
    """

    passes: Passes
    model_ranks: Ranks
    local: ModelConfig
    layers: Sequence[int]
    sharers: int
    sharer: int
    vocab_size: int

    @property
    def ranks(self) -> int:
        return self.model_ranks.size

    @property
    def leads(self) -> bool:
        return self.model_ranks.rank == 0

    def new_cache(self, room: int) -> Cache:
        shape = (len(self.layers), 2, self.local.num_query_groups, room, self.local.kv_channels)
        memory = self.passes.kernels.new_cache(shape, self.passes.dtype)
        return {layer: memory[number] for number, layer in enumerate(self.layers)}

    def copied(self, cache: Cache, room: int, tokens: int) -> Cache:
        new = self.new_cache(room)
        for layer, kept in cache.items():
            new[layer][:, :, :tokens] = kept[:, :, :tokens]
        return new

    def compute(self, batch: MicroBatch, kept: Sequence[Kept[Cache]], wanted: Wanted) -> Iterator[np.ndarray]:
        def attend(layer: int, *inputs: Any, **others: Any) -> tuple[Tensor, Pullback]:
            return self.passes.kernels.attention_over_kept(layer, *inputs, **others, kept=kept), _never

        with np.errstate(all="ignore"):
            hidden = self.passes.hidden(batch, wanted.rows, attend)
        parts = chunks(wanted.total, self.vocab_size, MINDSPORE.logits_chunk_bytes)
        return (self._logits(hidden, wanted, part) for part in parts)

    def _logits(self, hidden: Tensor | None, wanted: Wanted, part: slice) -> np.ndarray:
        """Logits of the whole vocabulary, from the ranks that end the model (`hidden` is not None)."""
        kernels, tensor, within = self.passes.kernels, self.passes.tensor, wanted.within(part)
        own = None
        if hidden is not None and within.start < within.stop:
            rows = kernels.rows(hidden, within.start, within.stop)
            product = kernels.product(rows, self.passes.head.value, transpose_b=True)
            own = product.astype(ms.float32).asnumpy()
        if self.model_ranks.group is None:
            assert own is not None
            return own
        logits = np.zeros((part.stop - part.start, self.vocab_size), np.float32)
        if own is not None:
            first = tensor.ranks.rank * tensor.vocabulary_rows
            logits[wanted.places[within] - part.start, first : first + own.shape[1]] = own
        return self.model_ranks.sum(Tensor.from_numpy(logits)).asnumpy()

    def from_first(self, value: Any) -> Any:
        return self.model_ranks.gather_values(value)[0]


def _never(gradient: Tensor) -> Tensor:
    raise AssertionError("sessions are not differentiated")
