"""Causal attention within documents on CPU, in blocks of query rows, in memory linear in the sequence length.

The forward pass keeps its input, its output and each row's log-sum-exp. The backward pass computes everything else
again, block by block ("FlashAttention-2", arXiv 2307.08691). MindSpore computes the products, and NumPy the rest, over
the same memory, split over the query groups.

With fp16, input and output are fp16, and everything in between is fp32, one document at a time. Products in fp16 would
round the scores, which flash attention does not do.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.compute.cpu.functional import normalise, normalise_backward
from tandem.backends.mindspore.compute.cpu.products import matmul
from tandem.backends.mindspore.compute.cpu.threads import split_work
from tandem.backends.mindspore.documents import Documents
from tandem.backends.mindspore.weight import Pullback, Weight, empty, single, written_in_single
from tandem.models.config import ModelConfig

# Query rows per block: scores of a block are [heads, BLOCK, keys up to its end].
BLOCK = 128

_LATER = np.triu(np.full((BLOCK, BLOCK), -np.inf, np.float32), 1)


def attention(
    qkv: Tensor, q_norm: Weight | None, k_norm: Weight | None, documents: Documents, config: ModelConfig
) -> tuple[Tensor, Pullback]:
    """Attention's output [t, A * d] from qkv [t, (A + 2G) * d], group after group: its queries, its key, its value.

    Queries and keys are normalised per head where there are norms, and rotated (arXiv 2104.09864). A token attends to
    its document, up to itself.
    """
    tokens, groups, head = qkv.shape[0], config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // groups
    rows = qkv.asnumpy().reshape(tokens, groups, per_group + 2, head)
    result, out = empty(tokens, groups * per_group * head, dtype=qkv.dtype)
    out = grouped(out, groups, head)
    cos, sin = documents.cos.asnumpy(), documents.sin.asnumpy()
    bounds = documents.cu_seqlens.tolist()
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]

    def heads_of(part: slice) -> Heads:
        return Heads(single(rows[part]), q_norm, k_norm, cos[part], sin[part], config.norm_epsilon)

    log_sum_exp = [forward(heads_of(part), out[:, :, part]) for part in parts]

    def backward(gradient: Tensor) -> Tensor:
        d_qkv, d_rows = empty(*qkv.shape, dtype=qkv.dtype)
        d_rows = d_rows.reshape(rows.shape)
        d_out = grouped(gradient.asnumpy(), groups, head)
        for part, document_log_sum_exp in zip(parts, log_sum_exp):
            heads = heads_of(part)
            document_out, document_d_out = single(out[:, :, part]), single(d_out[:, :, part])
            gradients = _backward(heads, document_out, document_log_sum_exp, document_d_out)
            with written_in_single(d_rows[part]) as document_d_rows:
                heads.backward(gradients, document_d_rows)
        return d_qkv

    return result, backward


def grouped(rows: np.ndarray, groups: int, head: int) -> np.ndarray:
    """[t, A * d] seen as [G, A/G, t, d]."""
    return rows.reshape(len(rows), groups, -1, head).transpose(1, 2, 0, 3)


class Heads:
    """Queries, keys and values of one document of s tokens, per head, ready for the products.

    queries [G, A/G, s, d] (normalised, rotated and divided by sqrt(d)), keys [G, s, d], values [G, s, d].
    """

    def __init__(
        self,
        rows: np.ndarray,  # [s, G, A/G + 2, d]
        q_norm: Weight | None,
        k_norm: Weight | None,
        cos: np.ndarray,
        sin: np.ndarray,
        epsilon: float,
    ) -> None:
        tokens, groups, slots, head = rows.shape
        by_group = rows.transpose(1, 2, 0, 3)
        scale = np.float32(head**-0.5)
        self._query = _Rotated(by_group[:, : slots - 2], q_norm, cos * scale, sin * scale, epsilon)
        self._key = _Rotated(by_group[:, slots - 2 : slots - 1], k_norm, cos, sin, epsilon)
        self.values = np.empty((groups, tokens, head), np.float32)

        def run(part: slice) -> None:
            self._query.forward(part)
            self._key.forward(part)
            self.values[part] = by_group[part, slots - 1]

        split_work(run, groups, rows.size)
        self.queries = self._query.result
        self.keys = self._key.result[:, 0]

    def backward(self, gradients: _Gradients, d_rows: np.ndarray) -> None:
        """Write the gradient of `rows`, and add those of the norms."""
        groups, slots = d_rows.shape[1:3]
        by_group = d_rows.transpose(1, 2, 0, 3)

        def run(part: slice) -> tuple[np.ndarray | None, np.ndarray | None]:
            by_group[part, slots - 1] = gradients.values[part]
            return (
                self._query.backward(part, gradients.queries, by_group[:, : slots - 2]),
                self._key.backward(part, gradients.keys[:, None], by_group[:, slots - 2 : slots - 1]),
            )

        d_gammas = split_work(run, groups, d_rows.size)
        for rotated, parts in zip((self._query, self._key), zip(*d_gammas)):
            if rotated.norm is not None:
                rotated.norm.add_gradient(Tensor.from_numpy(sum(parts[1:], parts[0])))


@dataclass(frozen=True)
class SomeHeads:
    """Those of some tokens of `Heads`, in the same shapes."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray


class _Rotated:
    """Norm and rotary embedding of heads [G, n, s, d]. Each call computes a slice of the groups."""

    def __init__(
        self, heads: np.ndarray, norm: Weight | None, cos: np.ndarray, sin: np.ndarray, epsilon: float
    ) -> None:
        self.heads, self.norm, self.cos, self.sin, self.epsilon = heads, norm, cos, sin, epsilon
        self.result = np.empty(heads.shape, np.float32)
        self.rstd = np.empty((*heads.shape[:-1], 1), np.float32)

    def forward(self, part: slice) -> None:
        heads = self.heads[part]
        if self.norm is not None:
            normed = np.empty(heads.shape, np.float32)
            self.rstd[part] = normalise(heads, self.norm.value.asnumpy(), self.epsilon, normed)
            heads = normed
        _rotate(heads, self.cos, self.sin, self.result[part])

    def backward(self, part: slice, d_result: np.ndarray, d_heads: np.ndarray) -> np.ndarray | None:
        """Write the gradient of `heads`; returns this part's share of the norm's, [d]."""
        # The transpose of a rotation rotates by the opposite angle.
        if self.norm is None:
            _rotate(d_result[part], self.cos, -self.sin, d_heads[part])
            return None
        d_normed = np.empty(d_result[part].shape, np.float32)
        _rotate(d_result[part], self.cos, -self.sin, d_normed)
        gamma = self.norm.value.asnumpy()
        return normalise_backward(d_normed, self.heads[part], self.rstd[part], gamma, d_heads[part])


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """Rotate each pair of channels (i, i + d/2) of x [..., s, d] by its angle, into `out`."""
    half = x.shape[-1] // 2
    np.multiply(x, cos, out=out)
    out[..., :half] -= x[..., half:] * sin[:, :half]
    out[..., half:] += x[..., :half] * sin[:, half:]


def _row_blocks(heads: Heads | SomeHeads) -> list[slice]:
    tokens = heads.keys.shape[1]
    return [slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


class _Block:
    """One block of a document's query rows, and the keys and values that it may attend to.

    query [G, A/G * rows, d]; keys and values [G, rows.stop, d].
    """

    def __init__(self, heads: Heads | SomeHeads, rows: slice) -> None:
        self.rows = rows
        self.groups, self.per_group, _, self.head = heads.queries.shape
        self.query = self.stack(heads.queries)
        self.keys = Tensor.from_numpy(np.ascontiguousarray(heads.keys[:, : rows.stop]))
        self.values = Tensor.from_numpy(np.ascontiguousarray(heads.values[:, : rows.stop]))

    def stack(self, array: np.ndarray) -> Tensor:
        """This block's rows of [G, A/G, s, d], as [G, A/G * rows, d]."""
        rows = np.ascontiguousarray(array[:, :, self.rows])
        return Tensor.from_numpy(rows.reshape(self.groups, -1, self.head))

    def unstack(self, tensor: Tensor) -> np.ndarray:
        """[G, A/G * rows, n] as [G, A/G, rows, n], in the same memory."""
        return tensor.asnumpy().reshape(self.groups, self.per_group, self.rows.stop - self.rows.start, -1)


def forward(heads: Heads | SomeHeads, out: np.ndarray) -> np.ndarray:
    """Write one document's output [G, A/G, s, d]; returns the log-sum-exp of its scores, [G, A/G, s, 1]."""
    log_sum_exp = np.empty((*heads.queries.shape[:3], 1), np.float32)
    for rows in _row_blocks(heads):
        log_sum_exp[:, :, rows] = _forward_block(_Block(heads, rows), out[:, :, rows])
    return log_sum_exp


def _forward_block(block: _Block, out: np.ndarray) -> np.ndarray:
    """The same for one block: `out` [G, A/G, rows, d], log-sum-exp [G, A/G, rows, 1]."""
    scores_tensor = matmul(block.query, block.keys, transpose_b=True)
    scores = block.unstack(scores_tensor)
    totals = np.empty((*scores.shape[:3], 1), np.float32)
    log_sum_exp = np.empty_like(totals)

    def exponentiate(part: slice) -> None:
        weights = scores[part]
        _mask(weights, block.rows)
        largest = weights.max(-1, keepdims=True)
        weights -= largest
        np.exp(weights, out=weights)
        weights.sum(-1, keepdims=True, out=totals[part])
        log_sum_exp[part] = largest + np.log(totals[part])

    split_work(exponentiate, block.groups, scores.size)
    np.divide(block.unstack(matmul(scores_tensor, block.values)), totals, out=out)
    return log_sum_exp


@dataclass
class _Gradients:
    """Gradients of `Heads`, in the same shapes."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def _backward(heads: Heads, out: np.ndarray, log_sum_exp: np.ndarray, d_out: np.ndarray) -> _Gradients:
    """Gradients of one document's heads; `out` and `d_out` are [G, A/G, s, d]."""
    dots = np.einsum("grsd,grsd->grs", d_out, out)[..., None]
    gradients = _Gradients(
        np.empty_like(heads.queries), np.zeros(heads.keys.shape, np.float32), np.zeros(heads.values.shape, np.float32)
    )
    for rows in _row_blocks(heads):
        _backward_block(_Block(heads, rows), log_sum_exp[:, :, rows], dots[:, :, rows], d_out, gradients)
    return gradients


def _backward_block(
    block: _Block, log_sum_exp: np.ndarray, dots: np.ndarray, d_out: np.ndarray, gradients: _Gradients
) -> None:
    """Add one block's share. With P the softmax and D = sum(d_out * out): d_scores = P * (d_out V^T - D)."""
    d_out_block = block.stack(d_out)
    weights_tensor = matmul(block.query, block.keys, transpose_b=True)
    d_scores_tensor = matmul(d_out_block, block.values, transpose_b=True)
    weights, d_scores = block.unstack(weights_tensor), block.unstack(d_scores_tensor)

    def differentiate(part: slice) -> None:
        _mask(weights[part], block.rows)
        np.subtract(weights[part], log_sum_exp[part], out=weights[part])
        np.exp(weights[part], out=weights[part])
        np.subtract(d_scores[part], dots[part], out=d_scores[part])
        np.multiply(d_scores[part], weights[part], out=d_scores[part])

    split_work(differentiate, block.groups, weights.size)
    seen = slice(0, block.rows.stop)
    gradients.values[:, seen] += matmul(weights_tensor, d_out_block, transpose_a=True).asnumpy()
    gradients.keys[:, seen] += matmul(d_scores_tensor, block.query, transpose_a=True).asnumpy()
    gradients.queries[:, :, block.rows] = block.unstack(matmul(d_scores_tensor, block.keys))


def _mask(scores: np.ndarray, rows: slice) -> None:
    """Hide later tokens from scores [..., rows, keys]. Only keys of the same block can be later."""
    size = rows.stop - rows.start
    scores[..., rows] += _LATER[:size, :size]
