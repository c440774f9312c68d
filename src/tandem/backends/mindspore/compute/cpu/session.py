"""Attention over kept keys and values on CPU, in NumPy. With fp16, only what is kept is fp16."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.compute.cpu.attention import Heads, SomeHeads, forward, grouped
from tandem.backends.mindspore.documents import Documents
from tandem.backends.mindspore.weight import Weight, empty, single
from tandem.backends.session import Kept
from tandem.models.config import ModelConfig

_DTYPES = {ms.float32: np.float32, ms.float16: np.float16}


def new_cache(shape: tuple[int, ...], dtype: ms.Type) -> np.ndarray:
    """Undefined numbers, outside of MindSpore's memory pool, which would not give the memory back."""
    return np.empty(shape, _DTYPES[dtype])


def attention_over_kept(
    layer: int,
    qkv: Tensor,
    q_norm: Weight | None,
    k_norm: Weight | None,
    documents: Documents,
    config: ModelConfig,
    kept: Sequence[Kept[np.ndarray]],
) -> Tensor:
    """`attention`, where each document continues a sequence, whose keys and values it is added to.

    A cache is [layers, keys or values, G, room, d].
    """
    groups, head = config.num_query_groups, config.kv_channels
    rows = single(qkv.asnumpy()).reshape(qkv.shape[0], groups, -1, head)
    cos, sin = documents.cos.asnumpy(), documents.sin.asnumpy()
    heads = Heads(rows, q_norm, k_norm, cos, sin, config.norm_epsilon)
    result, out = empty(qkv.shape[0], config.num_attention_heads * head, dtype=qkv.dtype)
    out = grouped(out, groups, head)
    for (first, last), sequence in zip(itertools.pairwise(documents.cu_seqlens.tolist()), kept):
        part = slice(first, last)
        new = SomeHeads(heads.queries[:, :, part], heads.keys[:, part], heads.values[:, part])
        _continue(new, sequence.cache[layer], sequence.start, out[:, :, part])
    return result


def _continue(new: SomeHeads, cache: np.ndarray, start: int, out: np.ndarray) -> None:
    """Add s tokens to one sequence's cache [2, G, room, d], and write their output [G, A/G, s, d]."""
    groups, per_group, tokens, head = new.queries.shape
    end = start + tokens
    cache[0, :, start:end], cache[1, :, start:end] = new.keys, new.values
    if start == 0 and tokens > 1:
        forward(new, out)
        return
    keys, values = single(cache[:, :, :end])
    scores = np.matmul(new.queries.reshape(groups, -1, head), keys.swapaxes(1, 2))
    if tokens > 1:
        later = np.arange(end) > np.arange(start, end)[:, None]
        scores.reshape(groups, per_group, tokens, end)[:, :, later] = -np.inf
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    totals = scores.sum(-1, keepdims=True)
    out[...] = (np.matmul(scores, values) / totals).reshape(out.shape)
