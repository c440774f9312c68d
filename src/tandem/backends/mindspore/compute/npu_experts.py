"""Routers and experts on Ascend NPUs.

Written from MindSpore's documentation; there was no NPU to run it on. The CPU's functions document each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from tandem.backends.experts import Routing
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.compute.npu import product, weight_gradient, zeros
from tandem.backends.mindspore.weight import Weight
from tandem.models.experts import Experts

_ROWS, _ONE_TENSOR = 0, 3  # of grouped_matmul: rows are in groups, and the result is one tensor


def route(
    x: Tensor, weight: Weight, experts: Experts, routing: Routing, layer: int
) -> tuple[Tensor, np.ndarray, Callable[[Tensor, Tensor], Tensor]]:
    """The probabilities are few numbers. They are computed on the host, so that ties break as on CPU."""
    exact = routing.settings.moe_router_dtype == "fp32"
    factor, values = (x, weight.value) if not exact else (x.astype(ms.float32), weight.value.astype(ms.float32))
    logits = product(factor, values, transpose_b=True).astype(ms.float32).asnumpy()
    chosen = np.ascontiguousarray(np.argsort(-logits, axis=1, kind="stable")[:, : experts.moe_router_topk])
    largest = logits.max(1, keepdims=True)
    exponentials = np.exp(logits - largest)
    totals = exponentials.sum(1, keepdims=True)
    probabilities = exponentials / totals
    log_sum_exp = (largest + np.log(totals))[:, 0]
    picked = np.take_along_axis(probabilities, chosen, 1)
    norms = picked.sum(1, keepdims=True) if experts.norm_topk_prob else np.float32(1)
    real = slice(0, routing.tokens)
    routing.counts[layer] = np.bincount(chosen[real].reshape(-1), minlength=experts.num_experts).astype(np.float32)
    routing.mass[layer] = probabilities[real].sum(0)
    routing.squares[layer] = np.square(log_sum_exp[real]).sum()

    def backward(gradient: Tensor, x: Tensor) -> Tensor:
        d_chosen = gradient.astype(ms.float32).asnumpy()
        if experts.norm_topk_prob:
            d_chosen = (d_chosen - (d_chosen * picked).sum(1, keepdims=True) / norms) / norms
        d_probabilities = np.zeros_like(probabilities)
        np.put_along_axis(d_probabilities, chosen, d_chosen, 1)
        if (slopes := routing.slopes(layer)) is not None:
            d_probabilities[real] += slopes
        d_logits = probabilities * (d_probabilities - (d_probabilities * probabilities).sum(1, keepdims=True))
        d_logits[real] += probabilities[real] * (np.float32(2 * routing.slope_of_z) * log_sum_exp[real, None])
        d_logits = Tensor(d_logits.astype(np.float32)).astype(x.dtype)
        if weight.trained:
            weight.add_gradient(weight_gradient(d_logits, x).astype(ms.float32))
        return product(d_logits, weight.value)

    return Tensor((picked / norms).astype(np.float32)).astype(x.dtype), chosen, backward


def expert_mlp(
    x: Tensor, factors: Tensor, fc1: Weight, fc2: Weight, counts: Sequence[int]
) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    gate_up = _grouped(x, fc1, counts, transposed=True)
    down = _grouped(ops.swiglu(gate_up) * factors, fc2, counts, transposed=True)

    def backward(gradient: Tensor, x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        active, pull = ms.vjp(ops.swiglu, gate_up)
        _add_grouped_gradient(fc2, gradient, active * factors, counts)
        d_weighted = _grouped(gradient, fc2, counts, transposed=False)
        dots = mint.sum(d_weighted.astype(ms.float32) * active.astype(ms.float32), 1, keepdim=True)
        d_gate_up = pull(d_weighted * factors)
        d_gate_up = d_gate_up[0] if isinstance(d_gate_up, tuple) else d_gate_up
        _add_grouped_gradient(fc1, d_gate_up, x, counts)
        return _grouped(d_gate_up, fc1, counts, transposed=False), dots.astype(factors.dtype)

    return down, backward


def sum_rows(x: Tensor, tokens: np.ndarray, count: int) -> Tensor:
    sums = mint.zeros((count, x.shape[1]), dtype=ms.float32)
    return mint.index_add(sums, 0, Tensor(tokens, ms.int32), x.astype(ms.float32)).astype(x.dtype)


def exchange(ranks: Ranks, x: Tensor, between: np.ndarray) -> Tensor:
    send, receive = between[ranks.rank].tolist(), between[:, ranks.rank].tolist()
    received = mint.empty((sum(receive), x.shape[1]), dtype=x.dtype)
    mint.distributed.all_to_all_single(received, x, receive, send, group=ranks.group)
    return received


def _grouped(x: Tensor, weight: Weight, counts: Sequence[int], *, transposed: bool) -> Tensor:
    """`transposed`: x is multiplied with the transpose of each expert's weight."""
    stack = weight.value.reshape(len(counts), -1, weight.value.shape[1])
    ends = Tensor(np.cumsum(counts), ms.int64)
    (result,) = ops.auto_generate.grouped_matmul(
        [x], [stack], group_list=ends, split_item=_ONE_TENSOR, group_type=_ROWS, transpose_b=transposed
    )
    return result


def _add_grouped_gradient(weight: Weight, gradient: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    if not weight.trained:
        return
    blocks, first = [], 0
    rows = weight.value.shape[0] // len(counts)
    for count in counts:
        part = slice(first, first + count)
        block = weight_gradient(gradient[part], x[part]) if count else zeros((rows, weight.value.shape[1]))
        blocks.append(block.astype(ms.float32))
        first += count
    weight.add_gradient(mint.cat(blocks, 0))
