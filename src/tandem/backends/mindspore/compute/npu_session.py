"""Attention over kept keys and values on Ascend NPUs. Written from MindSpore's documentation, as `npu`; never run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from tandem.backends.mindspore.compute.npu import Heads
from tandem.backends.mindspore.documents import Documents
from tandem.backends.mindspore.weight import Weight
from tandem.backends.session import Kept
from tandem.models.config import ModelConfig


def new_cache(shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
    return mint.empty(shape, dtype=dtype)


def attention_over_kept(
    layer: int,
    qkv: Tensor,
    q_norm: Weight | None,
    k_norm: Weight | None,
    documents: Documents,
    config: ModelConfig,
    kept: Sequence[Kept[Tensor]],
) -> Tensor:
    tokens, groups, head = qkv.shape[0], config.num_query_groups, config.kv_channels
    heads = Heads.of(qkv, q_norm, k_norm, documents, config)
    queries = heads.query.reshape(tokens, groups, -1, head)
    outputs = []
    for (first, last), sequence in zip(itertools.pairwise(documents.cu_seqlens.tolist()), kept):
        cache, end = sequence.cache[layer], sequence.start + last - first
        cache[0, :, sequence.start : end] = heads.key[first:last].swapaxes(0, 1)
        cache[1, :, sequence.start : end] = heads.value[first:last].swapaxes(0, 1)
        query = queries[first:last].transpose(1, 2, 0, 3)  # [groups, queries per group, new tokens, head]
        scores = mint.matmul(query, cache[0, :, None, :end].swapaxes(-1, -2)).astype(ms.float32) * head**-0.5
        later = np.arange(end) > np.arange(sequence.start, end)[:, None]
        scores = scores.masked_fill(Tensor(later), float("-inf"))
        weights = mint.softmax(scores, -1).astype(qkv.dtype)
        outputs.append(mint.matmul(weights, cache[1, :, None, :end]).transpose(2, 0, 1, 3).reshape(last - first, -1))
    return mint.cat(outputs, 0)
