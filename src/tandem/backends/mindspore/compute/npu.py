"""The kernels on Ascend NPUs: fused operators and their backward operators, called one by one.

Written from MindSpore's documentation; there was no NPU to run it on. Operators of `ops.auto_generate` are those that
MindSpore differentiates its own functions with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.documents import Documents
from tandem.backends.mindspore.weight import Pullback, Weight
from tandem.models.config import ModelConfig

MOST_DOCUMENTS = 1024  # that one call of flash attention takes
_MASK_SIZE = 2048  # of the causal mask that it takes in its compressed modes, whatever the lengths
_CAUSAL = 3  # sparse_mode: each document's lower right triangle
_ANY_NUMBER = 2**31 - 1

_PRODUCTS = {transposed: ops.MatMul(transpose_b=transposed) for transposed in (False, True)}
_product_ta = ops.MatMul(transpose_a=True)
_rms_norm_backward = ops.auto_generate.RmsNormGrad()


def product(a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
    return _PRODUCTS[transpose_b](a, b)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return _product_ta(gradient, x)


def embedding(tokens: Tensor, weight: Weight) -> tuple[Tensor, Pullback]:
    def backward(gradient: Tensor) -> Tensor:
        if weight.trained:
            # A tied embedding already has the head's gradient: rows are added to it in place.
            if not weight.has_gradient:
                weight.add_gradient(zeros(weight.value.shape))
            assert weight.gradient is not None
            weight.gradient.index_add_(0, tokens, gradient.astype(ms.float32))
        return gradient

    return mint.index_select(weight.value, 0, tokens), backward


def select_rows(x: Tensor, rows: Tensor | np.ndarray) -> tuple[Tensor, Pullback]:
    count, places = x.shape[0], _on_device(rows)
    return mint.index_select(x, 0, places), lambda gradient: place_rows(gradient, places, count)


def place_rows(x: Tensor, rows: Tensor | np.ndarray, count: int) -> Tensor:
    return mint.index_add(mint.zeros((count, x.shape[1]), dtype=x.dtype), 0, _on_device(rows), x)


def _on_device(rows: Tensor | np.ndarray) -> Tensor:
    """Row numbers: those of a micro-batch are already there, and those of experts are not."""
    return rows if isinstance(rows, Tensor) else Tensor(rows, ms.int32)


def rows(x: Tensor, start: int, stop: int) -> Tensor:
    return x[start:stop].contiguous()


def rms_norm(x: Tensor, weight: Weight, epsilon: float) -> tuple[Tensor, Pullback]:
    normed, rstd = _norm(epsilon)(x, weight.value)

    def backward(gradient: Tensor) -> Tensor:
        d_x, d_gamma = _rms_norm_backward(gradient, x, rstd, weight.value)
        weight.add_gradient(d_gamma)
        return d_x

    return normed, backward


@cache
def _norm(epsilon: float) -> ops.Primitive:
    return ops.auto_generate.RmsNorm(epsilon)


def swiglu(gate_up: Tensor) -> tuple[Tensor, Pullback]:
    return ops.swiglu(gate_up, -1), lambda gradient: ops.auto_generate.swiglu_grad(gradient, gate_up, -1)


def attention(
    qkv: Tensor, q_norm: Weight | None, k_norm: Weight | None, documents: Documents, config: ModelConfig
) -> tuple[Tensor, Pullback]:
    """Flash attention over documents. It computes in the half precision of qkv, or, for fp32, in bf16.

    Of the heads only qkv is kept: they are made again in the backward pass.
    """
    tokens, heads, head = qkv.shape[0], config.num_attention_heads, config.kv_channels
    half = ms.bfloat16 if qkv.dtype == ms.float32 else qkv.dtype
    made = Heads.of(qkv, q_norm, k_norm, documents, config)
    score = _flash(heads, head)
    kept = [
        score(
            *(x[part].astype(half) for x in (made.query, made.key, made.value)),
            *(None, None, None, _causal_mask(), None),  # no shift, dropout or padding, and no prefix
            ends,
            ends,
        )
        for part, ends in documents.groups(MOST_DOCUMENTS)
    ]
    del made

    def backward(gradient: Tensor) -> Tensor:
        made = Heads.of(qkv, q_norm, k_norm, documents, config)
        d_out = gradient.reshape(tokens, heads, head)
        parts = []
        for (part, ends), (largest, sums, softmax, out) in zip(documents.groups(MOST_DOCUMENTS), kept):
            query, key, value, d_part = (x[part].astype(half) for x in (made.query, made.key, made.value, d_out))
            of_part = _flash_backward(heads, head)(
                *(query, key, value, d_part, None, None, None, _causal_mask()),
                *(largest, sums, softmax, out, None, ends, ends),
            )
            parts.append(of_part[:3])
        return made.backward(*map(_joined, zip(*parts)))

    return _joined([out for _, _, _, out in kept]).reshape(tokens, heads * head).astype(qkv.dtype), backward


@dataclass(frozen=True)
class Heads:
    """Queries [t, A, d] and keys [t, G, d], normalised where there are norms, and rotated; values [t, G, d].

    Attributes:
        plain: queries and keys as they came.
        scales: of the norms; None where there are none.
        norms: of queries and keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    plain: tuple[Tensor, Tensor]
    scales: tuple[Tensor | None, Tensor | None]
    norms: tuple[Weight | None, Weight | None]
    documents: Documents
    groups: int

    @classmethod
    def of(
        cls, qkv: Tensor, q_norm: Weight | None, k_norm: Weight | None, documents: Documents, config: ModelConfig
    ) -> Heads:
        """From qkv [t, (A + 2G) * d], group after group: its queries, its key, its value."""
        tokens, groups, head = qkv.shape[0], config.num_query_groups, config.kv_channels
        by_group = qkv.reshape(tokens, groups, -1, head)
        query = by_group[:, :, :-2].reshape(tokens, -1, head)
        key, value = by_group[:, :, -2].contiguous(), by_group[:, :, -1].contiguous()
        normed = [
            (x, None) if norm is None else _norm(config.norm_epsilon)(x, norm.value)
            for x, norm in ((query, q_norm), (key, k_norm))
        ]
        turned_query, turned_key = (_rotated(x, documents.cos, documents.sin) for x, _ in normed)
        scales = normed[0][1], normed[1][1]
        return cls(turned_query, turned_key, value, (query, key), scales, (q_norm, k_norm), documents, groups)

    def backward(self, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> Tensor:
        """The gradient of qkv from those of the heads. Adds the gradients of the norms."""
        tokens, _, head = d_query.shape
        parts = []
        for gradient, x, scale, norm in zip((d_query, d_key), self.plain, self.scales, self.norms):
            back = _rotated(gradient.astype(x.dtype), self.documents.cos, self.documents.negative_sin)
            if norm is not None:
                back, d_gamma = _rms_norm_backward(back, x, scale, norm.value)
                norm.add_gradient(d_gamma)
            parts.append(back.reshape(tokens, self.groups, -1, head))
        parts.append(d_value.astype(self.value.dtype).reshape(tokens, self.groups, 1, head))
        return mint.cat(parts, 2).reshape(tokens, -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [t, heads, d], each pair of channels (i, i + d/2) rotated by its angle. The operator takes [1, t, heads, d]."""
    tokens, _, head = x.shape
    of_tokens = (1, tokens, 1, head)
    turned = ops.auto_generate.rotary_position_embedding(
        x.reshape(1, tokens, -1, head), cos.reshape(of_tokens), sin.reshape(of_tokens), 0
    )
    return turned.reshape(x.shape)


@cache
def _causal_mask() -> Tensor:
    """1 above the diagonal, made on the device. It is the same for every layer and batch."""
    return mint.triu(mint.ones((_MASK_SIZE, _MASK_SIZE), dtype=ms.uint8), 1)


@cache
def _flash(heads: int, head: int) -> ops.Primitive:
    return ops.auto_generate.FlashAttentionScore(heads, 1.0, head**-0.5, _ANY_NUMBER, 0, 0, "TND", _CAUSAL)


@cache
def _flash_backward(heads: int, head: int) -> ops.Primitive:
    return ops.auto_generate.FlashAttentionScoreGrad(heads, 1.0, head**-0.5, _ANY_NUMBER, 0, 0, "TND", _CAUSAL)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else mint.cat(list(parts), 0)


def zeros(shape: tuple[int, ...]) -> Tensor:
    return mint.zeros(shape, dtype=ms.float32)


def sum_over(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(ranks.sum(tensor))


def gather_rows(ranks: Ranks, weights: Sequence[Weight]) -> None:
    for weight in weights:
        weight.value.copy_(ranks.gather_rows(weight.master.astype(weight.value.dtype), weight.value.shape[0]))


def scatter_rows(ranks: Ranks, x: Tensor) -> Tensor:
    return ranks.sum_rows(x)
