"""Keys and values that are kept, and attention over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tandem.backends.loss import chunks
from tandem.backends.session import Kept
from tandem.backends.torch.attention import Run, attention
from tandem.backends.torch.communication import Ranks, from_first
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.functional import matmul
from tandem.backends.torch.passes import Passes
from tandem.backends.torch.tensor_parallel import TensorParallel
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig

# layer, keys or values, group, token, channel
Cache = torch.Tensor


@dataclass(frozen=True)
class TorchSession:
    """`tandem.backends.session.Computes` on PyTorch. `config` has the sizes of this rank's slices."""

    passes: Passes
    tensor: TensorParallel | None
    everyone: Ranks
    config: ModelConfig

    @property
    def ranks(self) -> int:
        return self.everyone.size

    @property
    def leads(self) -> bool:
        return self.everyone.rank == 0

    def new_cache(self, room: int) -> Cache:
        config = self.config
        shape = (config.num_layers, 2, config.num_query_groups, room, config.kv_channels)
        return torch.empty(shape, dtype=self.passes.dtype, device=self.passes.device)

    def copied(self, cache: Cache, room: int, tokens: int) -> Cache:
        new = self.new_cache(room)
        new[:, :, :, :tokens] = cache[:, :, :, :tokens]
        return new

    @torch.no_grad()
    def compute(self, batch: MicroBatch, kept: Sequence[Kept[Cache]], rows: np.ndarray) -> Iterator[np.ndarray]:
        wanted = torch.from_numpy(rows).to(self.passes.device)
        hidden = self.passes.hidden(batch, wanted, OverKept(kept, batch.lengths.tolist()))
        head = self.passes.chunks[0].head
        vocabulary = len(head) if self.tensor is None else self.tensor.vocabulary_rows
        most_bytes = kernels_of(self.passes.device).logits_chunk_bytes
        return (self._logits(hidden[part], head) for part in chunks(len(rows), vocabulary, most_bytes))

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor, head: torch.Tensor) -> np.ndarray:
        logits = matmul(hidden, head).float()
        if self.tensor is not None:
            logits = self.tensor.gather_vocabulary(logits, self.passes.config.vocab_size)
        return logits.cpu().numpy()

    def from_first(self, value: Any) -> Any:
        return from_first(self.everyone, value)


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
    if start == 0 and tokens > 1:
        return attention(q, k, v, [Run(1, tokens)])
    keys, values = cache[:, None, :, :end]
    # A group's heads stand among its queries, [1, groups, t * heads per group, d]: its keys are read once.
    queries = q.unflatten(1, (groups, -1)).permute(1, 0, 2, 3)
    per_group = queries.shape[2]
    mask = None
    if tokens > 1:
        last = torch.arange(start, end, device=q.device).repeat_interleave(per_group)
        mask = torch.arange(end, device=q.device) <= last[:, None]
    output = scaled_dot_product_attention(queries.flatten(1, 2)[None], keys, values, attn_mask=mask)
    return output[0].unflatten(1, (tokens, per_group)).transpose(0, 1).flatten(1)
