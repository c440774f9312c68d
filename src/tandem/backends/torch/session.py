"""Keys and values that are kept, and attention over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tandem.backends.loss import chunks
from tandem.backends.session import Kept, Wanted
from tandem.backends.torch.communication import Ranks, all_reduce, from_first
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.functional import matmul
from tandem.backends.torch.passes import Passes
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig

Cache = dict[int, torch.Tensor]  # by layer: keys or values, group, token, channel


@dataclass(frozen=True)
class TorchSession:
    """`tandem.backends.session.Computes` on PyTorch.

    Attributes:
        model_ranks: those that hold the model together.
        local: the config with the sizes of this rank's slices.
        layers: those on this rank, by their number in the whole model.
        sharers, sharer: of the data ranks that share experts, how many there are and which one this is.
    """

    passes: Passes
    model_ranks: Ranks
    local: ModelConfig
    layers: Sequence[int]
    sharers: int
    sharer: int

    @property
    def ranks(self) -> int:
        return self.model_ranks.size

    @property
    def leads(self) -> bool:
        return self.model_ranks.rank == 0

    def new_cache(self, room: int) -> Cache:
        shape = (len(self.layers), 2, self.local.num_query_groups, room, self.local.kv_channels)
        memory = torch.empty(shape, dtype=self.passes.dtype, device=self.passes.device)
        return dict(zip(self.layers, memory))

    def copied(self, cache: Cache, room: int, tokens: int) -> Cache:
        new = self.new_cache(room)
        for layer, kept in cache.items():
            new[layer][:, :, :tokens] = kept[:, :, :tokens]
        return new

    @torch.no_grad()
    def compute(self, batch: MicroBatch, kept: Sequence[Kept[Cache]], wanted: Wanted) -> Iterator[np.ndarray]:
        rows = torch.from_numpy(wanted.rows).to(self.passes.device)
        hidden = self.passes.hidden(batch, rows, OverKept(kept, batch.lengths.tolist()))
        most_bytes = kernels_of(self.passes.device).logits_chunk_bytes
        parts = chunks(wanted.total, self.passes.config.vocab_size, most_bytes)
        return (self._logits(hidden, wanted, part) for part in parts)

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor | None, wanted: Wanted, part: slice) -> np.ndarray:
        """Logits of the whole vocabulary, from the ranks that end the model (`hidden` is not None)."""
        within = wanted.within(part)
        own = None
        if hidden is not None and within.start < within.stop:
            own = matmul(hidden[within], self.passes.chunks[-1].head).float()
        if self.model_ranks.group is None:
            assert own is not None
            return own.cpu().numpy()
        logits = torch.zeros(part.stop - part.start, self.passes.config.vocab_size, device=self.passes.device)
        if own is not None:
            tensor = self.passes.chunks[-1].tensor
            first = 0 if tensor is None else tensor.first_row
            places = torch.from_numpy(wanted.places[within] - part.start).to(self.passes.device)
            logits[places, first : first + own.shape[1]] = own
        all_reduce(logits, self.model_ranks.group).wait()
        return logits.cpu().numpy()

    def from_first(self, value: Any) -> Any:
        return from_first(self.model_ranks, value)


@dataclass(frozen=True)
class OverKept:
    """Tokens attend to those that are kept of their sequence, and to the new ones up to themselves.

    Attributes:
        lengths: of each sequence's new tokens.
    """

    kept: Sequence[Kept[Cache]]
    lengths: Sequence[int]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(self.kept, *(x.split(list(self.lengths)) for x in (q, k, v)))
        outputs = [_continued(sequence.cache[layer], sequence.start, *part) for sequence, *part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _continued(cache: torch.Tensor, start: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[t, heads * d] for t new tokens of one sequence, which are added at `start` to cache [2, groups, room, d]."""
    tokens, groups = len(q), len(cache[0])
    end = start + tokens
    cache[0, :, start:end] = k.transpose(0, 1)
    cache[1, :, start:end] = v.transpose(0, 1)
    kernels = kernels_of(q.device)
    if start == 0 and tokens > 1:
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
        return kernels.attention(q, k, v, kernels.documents([tokens], starts))
    keys, values = cache[:, None, :, :end]
    # A group's heads stand among its queries, [1, groups, t * heads per group, d]: its keys are read once.
    queries = q.unflatten(1, (groups, -1)).permute(1, 0, 2, 3)
    per_group = queries.shape[2]
    mask = None
    if tokens > 1:
        last = torch.arange(start, end, device=q.device).repeat_interleave(per_group)
        mask = torch.arange(end, device=q.device) <= last[:, None]
    output = kernels.attention_over_kept(queries.flatten(1, 2)[None], keys, values, mask)
    return output[0].unflatten(1, (tokens, per_group)).transpose(0, 1).flatten(1)
