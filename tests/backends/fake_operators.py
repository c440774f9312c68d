"""The stand-in's operators of Ascend (`fake_mindspore`): the functions that `backends/mindspore/compute` calls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from fake_tensor import RECORD, Tensor, bfloat16, empty, float16, float32, int64, made, uint8

HALF = (float16, bfloat16)
MASK = (2048, 2048)


class MatMul:
    def __init__(self, transpose_a: bool = False, transpose_b: bool = False) -> None:
        self.transpose_a, self.transpose_b = transpose_a, transpose_b

    def __call__(self, input: Tensor, mat2: Tensor) -> Tensor:
        assert input.dtype == mat2.dtype, (input.dtype, mat2.dtype)
        (rows, inner), (inner_too, columns) = input.shape[:: self._step(0)], mat2.shape[:: self._step(1)]
        assert inner == inner_too, (input.shape, mat2.shape)
        compute = lambda a, b: (a.T if self.transpose_a else a) @ (b.T if self.transpose_b else b)  # noqa: E731
        return made("matmul", (rows, columns), input.dtype, [input, mat2], compute)

    def _step(self, place: int) -> int:
        return -1 if (self.transpose_a, self.transpose_b)[place] else 1


class RmsNorm:
    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon

    def __call__(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == gamma.dtype
        assert x.shape[-1:] == gamma.shape
        scale = lambda values: 1 / np.sqrt((values**2).mean(-1, keepdims=True) + self.epsilon)  # noqa: E731
        normed = made("RmsNorm", x.shape, x.dtype, [x, gamma], lambda values, g: values * scale(values) * g)
        return normed, Tensor._of(None if x.values is None else scale(x.values), (*x.shape[:-1], 1), float32)


class RmsNormGrad:
    def __call__(self, dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        assert dy.dtype == x.dtype == gamma.dtype
        assert (dy.shape, rstd.shape, rstd.dtype) == (x.shape, (*x.shape[:-1], 1), float32)

        def compute(dy: np.ndarray, x: np.ndarray, rstd: np.ndarray, gamma: np.ndarray) -> np.ndarray:
            y, g = x * rstd, dy * gamma
            return rstd * (g - y * (g * y).mean(-1, keepdims=True))

        d_x = made("RmsNormGrad", x.shape, x.dtype, [dy, x, rstd, gamma], compute)
        values = None
        if d_x.values is not None:
            values = (dy.values * x.values * rstd.values).reshape(-1, x.shape[-1]).sum(0)
        return d_x, Tensor._of(values, gamma.shape, float32)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    assert dim == -1
    assert 0 not in input.shape, "the operator takes no tensor without numbers"
    shape = (*input.shape[:-1], input.shape[-1] // 2)

    def compute(values: np.ndarray) -> np.ndarray:
        gate, up = np.split(values, 2, -1)
        return gate / (1 + np.exp(-gate)) * up

    return made("swiglu", shape, input.dtype, [input], compute)


def swiglu_grad(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    assert (dim, grad_output.dtype) == (-1, input.dtype)
    assert 0 not in input.shape, "the operator takes no tensor without numbers"

    def compute(gradient: np.ndarray, values: np.ndarray) -> np.ndarray:
        gate, up = np.split(values, 2, -1)
        share = 1 / (1 + np.exp(-gate))
        return np.concatenate([gradient * up * share * (1 + gate * (1 - share)), gradient * gate * share], -1)

    return made("swiglu_grad", input.shape, input.dtype, [grad_output, input], compute)


def rotary_position_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int = 0) -> Tensor:
    assert mode == 0
    assert x.dtype == cos.dtype == sin.dtype
    assert cos.shape == sin.shape == (1, x.shape[1], 1, x.shape[3])
    assert x.shape[3] < 896

    def compute(values: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        first, second = np.split(values, 2, -1)
        return values * cos + np.concatenate([-second, first], -1) * sin

    return made("rotary_position_embedding", x.shape, x.dtype, [x, cos, sin], compute)


@dataclass
class _Flash:
    head_num: int
    keep_prob: float = 1.0
    scale_value: float = 1.0
    pre_tokens: int = 65536
    next_tokens: int = 65536
    inner_precise: int = 0
    input_layout: str = "BSH"
    sparse_mode: int = 0

    def check(self, query: Tensor, key: Tensor, mask: Tensor, ends: list[int], other_ends: list[int]) -> None:
        assert (self.input_layout, self.sparse_mode, self.next_tokens, self.keep_prob) == ("TND", 3, 0, 1.0)
        assert query.dtype in HALF
        assert query.shape[1] == self.head_num
        assert self.head_num % key.shape[1] == 0
        assert (mask.shape, mask.dtype) == (MASK, uint8)
        assert ends == other_ends
        assert ends[-1] == query.shape[0] <= self.pre_tokens
        assert all(last > first for first, last in zip([0, *ends], ends)), "a document without tokens"
        RECORD.documents.append(len(ends))

    def parts(self, ends: list[int], *arrays: np.ndarray) -> Any:
        """Of each document: its rows, and each array as [heads, s, d], keys and values repeated."""
        for first, last in zip([0, *ends], ends):
            of_document = [array[first:last].swapaxes(0, 1) for array in arrays]
            yield slice(first, last), [x.repeat(self.head_num // len(x), 0) for x in of_document]

    def weights(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        scores = q @ k.swapaxes(1, 2) * self.scale_value
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)


class FlashAttentionScore(_Flash):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real_shift: None = None,
        drop_mask: None = None,
        padding_mask: None = None,
        attn_mask: Any = None,
        prefix: None = None,
        actual_seq_qlen: Any = None,
        actual_seq_kvlen: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.check(query, key, attn_mask, actual_seq_qlen, actual_seq_kvlen)

        def compute(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            out = np.empty_like(q)
            for rows, (of_q, of_k, of_v) in self.parts(actual_seq_qlen, q, k, v):
                out[rows] = (self.weights(of_q, of_k) @ of_v).swapaxes(0, 1)
            return out

        out = made("FlashAttentionScore", query.shape, query.dtype, [query, key, value], compute)
        sums = empty((*query.shape[:2], 8), dtype=float32)
        return sums, sums, empty((0,), dtype=query.dtype), out


class FlashAttentionScoreGrad(_Flash):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dy: Tensor,
        pse_shift: None = None,
        drop_mask: None = None,
        padding_mask: None = None,
        atten_mask: Any = None,
        softmax_max: Any = None,
        softmax_sum: Any = None,
        softmax_in: Any = None,
        attention_in: Any = None,
        prefix: None = None,
        actual_seq_qlen: Any = None,
        actual_seq_kvlen: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.check(query, key, atten_mask, actual_seq_qlen, actual_seq_kvlen)
        assert softmax_max.shape == softmax_sum.shape == (*query.shape[:2], 8)
        assert attention_in.shape == dy.shape == query.shape
        assert dy.dtype == query.dtype
        groups = key.shape[1]

        def compute(q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray, out: np.ndarray) -> np.ndarray:
            gradients = np.zeros((3, *q.shape), np.float32)
            for rows, (of_q, of_k, of_v, of_dy, of_out) in self.parts(actual_seq_qlen, q, k, v, dy, out):
                weights = self.weights(of_q, of_k)
                d_scores = weights * (of_dy @ of_v.swapaxes(1, 2) - (of_dy * of_out).sum(-1, keepdims=True))
                d_scores *= self.scale_value
                d_heads = d_scores @ of_k, d_scores.swapaxes(1, 2) @ of_q, weights.swapaxes(1, 2) @ of_dy
                gradients[:, rows] = np.stack(d_heads).swapaxes(1, 2)
            return gradients

        inputs = [query, key, value, dy, attention_in]
        whole = made("FlashAttentionScoreGrad", (3, *query.shape), query.dtype, inputs, compute).values

        def of_groups(values: np.ndarray) -> np.ndarray:
            return values.reshape(len(values), groups, -1, values.shape[-1]).sum(2)

        results = [None] * 3 if whole is None else [whole[0], of_groups(whole[1]), of_groups(whole[2])]
        tensors = [Tensor._of(values, x.shape, x.dtype) for values, x in zip(results, (query, key, value))]
        return *tensors, empty((0,), dtype=query.dtype)


class AdamW:
    def __call__(
        self,
        var: Tensor,
        m: Tensor,
        v: Tensor,
        max_v: Tensor,
        gradient: Tensor,
        step: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        decay: float,
        eps: float,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        assert not amsgrad
        assert not maximize
        assert step.shape == (1,)
        assert {tensor.dtype for tensor in (var, m, v, gradient)} == {float32}
        assert var.shape == m.shape == v.shape == gradient.shape
        RECORD.kernels["AdamW"] += 1
        RECORD.move("AdamW", var, m, v, gradient, var, m, v)
        if var.values is None:
            return
        number = float(step.values[0]) + 1
        m.values[...] = beta1 * m.values + (1 - beta1) * gradient.values
        v.values[...] = beta2 * v.values + (1 - beta2) * gradient.values**2
        root = np.sqrt(v.values / (1 - beta2**number)) + eps
        var.values[...] = var.values * (1 - lr * decay) - lr * m.values / (1 - beta1**number) / root


def gmm(
    x: list[Tensor],
    weight: list[Tensor],
    bias: None = None,
    group_list: Any = None,
    group_type: int = 0,
    group_list_type: int = 0,
) -> tuple[Tensor]:
    """Groups of rows (`group_type` 0), or of what is summed (2): a group without any gives zeros then."""
    (left,), (right,) = x, weight
    assert group_list_type == 0
    assert left.dtype == right.dtype
    assert group_list.dtype == int64
    assert len(group_list.shape) == 1
    assert group_list.shape[0] <= 1024
    assert 0 not in left.shape
    ranges = () if group_list.values is None else [slice(*ends) for ends in pairwise([0, *group_list.values])]
    if group_type == 0:
        assert left.is_contiguous
        assert right.is_contiguous or right.is_transposed
        assert right.shape[:2] == (group_list.shape[0], left.shape[1])
        shape: tuple[int, ...] = (left.shape[0], right.shape[2])
    else:
        assert group_type == 2
        assert left.is_transposed, "MindSpore documents: non-contiguous tensors which have been transposed"
        assert right.is_contiguous
        assert left.shape[1] == right.shape[0]
        shape = (group_list.shape[0], left.shape[0], right.shape[1])

    def compute(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        assert ranges[-1].stop == left.shape[1 if group_type else 0]
        if group_type:
            return np.stack([left[:, part] @ right[part] for part in ranges])
        return np.concatenate([left[part] @ matrix for part, matrix in zip(ranges, right)])

    return (made("gmm", shape, left.dtype, [left, right], compute),)


OPERATORS = {
    "RmsNorm": RmsNorm,
    "RmsNormGrad": RmsNormGrad,
    "swiglu_grad": swiglu_grad,
    "rotary_position_embedding": rotary_position_embedding,
    "FlashAttentionScore": FlashAttentionScore,
    "FlashAttentionScoreGrad": FlashAttentionScoreGrad,
    "AdamW": AdamW,
}
