"""The kernels on Ascend NPUs: fused operators, differentiated by MindSpore one at a time.

Written from MindSpore's documentation; there was no NPU to run it on. A function is differentiated inside its backward
pass, where it runs forward again. Reasons: `ms.vjp` keeps memory for a pullback that is never called, and pullbacks
must be called last in, first out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from tandem.backends.loss import chunks, split_scale
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.documents import Documents
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Pullback, Weight
from tandem.frameworks import MINDSPORE
from tandem.models.config import ModelConfig

# The causal mask that flash attention takes in its compressed modes, whatever the lengths.
_MASK_SIZE = 2048
_CAUSAL = 3  # sparse_mode: each document's lower right triangle

_PRODUCTS = {transposed: ops.MatMul(transpose_b=transposed) for transposed in (False, True)}
_product_ta = ops.MatMul(transpose_a=True)


def _differentiable(
    function: Callable[..., Tensor], x: Tensor, weights: Sequence[Weight] = ()
) -> tuple[Tensor, Pullback]:
    values = [weight.value for weight in weights]

    def backward(gradient: Tensor) -> Tensor:
        _, pull = ms.vjp(function, x, *values)
        gradients = pull(gradient)
        d_x, *d_weights = gradients if isinstance(gradients, tuple) else (gradients,)
        for weight, d_weight in zip(weights, d_weights):
            weight.add_gradient(d_weight)
        return d_x

    return function(x, *values), backward


def product(a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
    return _PRODUCTS[transpose_b](a, b)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return _product_ta(gradient, x)


def embedding(tokens: np.ndarray, weight: Weight) -> tuple[Tensor, Pullback]:
    index = Tensor(tokens, ms.int32)

    def backward(gradient: Tensor) -> Tensor:
        if not weight.trained:
            return gradient
        rows = mint.index_add(zeros(weight.value.shape), 0, index, gradient.astype(ms.float32))
        weight.add_gradient(rows)
        return gradient

    return mint.index_select(weight.value, 0, index), backward


def select_rows(x: Tensor, rows: np.ndarray) -> tuple[Tensor, Pullback]:
    count = x.shape[0]
    return mint.index_select(x, 0, Tensor(rows, ms.int32)), lambda gradient: place_rows(gradient, rows, count)


def place_rows(x: Tensor, rows: np.ndarray, count: int) -> Tensor:
    return mint.index_add(mint.zeros((count, x.shape[1]), dtype=x.dtype), 0, Tensor(rows, ms.int32), x)


def rows(x: Tensor, start: int, stop: int) -> Tensor:
    return x[start:stop].contiguous()


def rms_norm(x: Tensor, weight: Weight, epsilon: float) -> tuple[Tensor, Pullback]:
    return _differentiable(lambda x, gamma: ops.rms_norm(x, gamma, epsilon)[0], x, [weight])


def swiglu(gate_up: Tensor) -> tuple[Tensor, Pullback]:
    return _differentiable(ops.swiglu, gate_up)


def attention(
    qkv: Tensor, q_norm: Weight | None, k_norm: Weight | None, documents: Documents, config: ModelConfig
) -> tuple[Tensor, Pullback]:
    """Flash attention over documents. It computes in the half precision of qkv, or, for fp32, in bf16."""
    tokens, groups, head = qkv.shape[0], config.num_query_groups, config.kv_channels
    heads = config.num_attention_heads
    cos, sin = documents.cos.reshape(tokens, 1, head), documents.sin.reshape(tokens, 1, head)
    ends = documents.cu_seqlens[1:].tolist()
    half = ms.bfloat16 if qkv.dtype == ms.float32 else qkv.dtype
    mask = Tensor(np.triu(np.ones((_MASK_SIZE, _MASK_SIZE), np.uint8), 1))

    def prepared(x: Tensor, gamma: Sequence[Tensor]) -> Tensor:
        return rotated(x, gamma, cos, sin, config).astype(half)

    def function(qkv: Tensor, *gammas: Tensor) -> Tensor:
        by_group = qkv.reshape(tokens, groups, heads // groups + 2, head)
        query = prepared(by_group[:, :, :-2].reshape(tokens, heads, head), gammas[:1])
        key = prepared(by_group[:, :, -2], gammas[1:])
        out = ops.flash_attention_score(
            query,
            key,
            by_group[:, :, -1].astype(half),
            heads,
            attn_mask=mask,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            scalar_value=head**-0.5,
            input_layout="TND",
            sparse_mode=_CAUSAL,
        )
        return out.reshape(tokens, heads * head).astype(qkv.dtype)

    return _differentiable(function, qkv, [norm for norm in (q_norm, k_norm) if norm is not None])


def rotated(x: Tensor, gamma: Sequence[Tensor], cos: Tensor, sin: Tensor, config: ModelConfig) -> Tensor:
    """Heads x [..., d], normalised where there is a gamma [d], and rotated by angles of the same number of axes."""
    normed = ops.rms_norm(x, gamma[0], config.norm_epsilon)[0] if gamma else x
    first, second = mint.split(normed, config.kv_channels // 2, -1)
    return normed * cos + mint.cat((-second, first), -1) * sin


def token_losses(
    hidden: Tensor, head: Weight, labels: np.ndarray, tensor: TensorParallel, most_likely: np.ndarray | None = None
) -> np.ndarray:
    losses = np.empty(len(labels), np.float32)
    for part in chunks(len(labels), tensor.vocabulary_rows, MINDSPORE.device_logits_chunk_bytes):
        logits = product(hidden[part], head.value, transpose_b=True).astype(ms.float32)
        losses[part] = _losses(logits, labels[part], tensor)[0]
        if most_likely is not None:
            largest, places = mint.max(logits, -1)
            most_likely[part] = tensor.first_largest(largest.asnumpy(), places.asnumpy())
    return losses


def cross_entropy_and_gradient(
    hidden: Tensor, head: Weight, labels: np.ndarray, weights: np.ndarray, tensor: TensorParallel
) -> tuple[float, Tensor]:
    scale, shares = split_scale(weights)
    total, gradients = 0.0, []
    for part in chunks(len(labels), tensor.vocabulary_rows, MINDSPORE.device_logits_chunk_bytes):
        rows = hidden[part]
        logits = product(rows, head.value, transpose_b=True).astype(ms.float32)
        losses, d_logits = _losses(logits, labels[part], tensor)
        total += float(np.sum(losses * weights[part]))
        # Scaled only now, so that the loss scale does not reduce the range of fp16.
        d_logits = d_logits.astype(hidden.dtype)
        share = Tensor(shares[part, None].astype(np.float32)).astype(hidden.dtype)
        gradients.append(product(d_logits, head.value) * share * scale)
        if head.trained:
            head.add_gradient(weight_gradient(d_logits, rows * share).astype(ms.float32) * scale)
    return total, mint.cat(gradients, 0)


def _losses(logits: Tensor, labels: np.ndarray, tensor: TensorParallel) -> tuple[np.ndarray, Tensor]:
    """Each row's loss, fp32, and the gradient of their sum with respect to their logits, fp32."""
    local, size = tensor.local(labels), logits.shape[-1]
    here = (local >= 0) & (local < size)
    one_hot = mint.nn.functional.one_hot(Tensor(np.where(here, local, 0), ms.int64), size).astype(ms.float32)
    one_hot = one_hot * Tensor(here[:, None].astype(np.float32))
    log_sum_exp, label_logits = tensor.softmax_over_ranks(
        mint.logsumexp(logits, -1).asnumpy(), mint.sum(logits * one_hot, -1).asnumpy()
    )
    return log_sum_exp - label_logits, mint.exp(logits - Tensor(log_sum_exp[:, None])) - one_hot


def zeros(shape: tuple[int, ...]) -> Tensor:
    return mint.zeros(shape, dtype=ms.float32)


def scale(tensor: Tensor, factor: float) -> None:
    tensor.mul_(factor)


def sum_of_squares(tensor: Tensor) -> float:
    return float(mint.sum(mint.square(tensor)).asnumpy())


def sum_over(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(ranks.sum(tensor))


def gather_rows(ranks: Ranks, weights: Sequence[Weight]) -> None:
    for weight in weights:
        count, step = weight.value.shape[0], -(-weight.value.shape[0] // ranks.size)
        rows = weight.master.astype(weight.value.dtype)
        padding = mint.zeros((step - rows.shape[0], *rows.shape[1:]), dtype=rows.dtype)
        weight.value.copy_(mint.cat(ranks.gather(mint.cat((rows, padding), 0)), 0)[:count])
