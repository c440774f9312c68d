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
from tandem.backends.mindspore.compute.npu import product, weight_gradient
from tandem.backends.mindspore.expert_adapters import RouterWeight, Stack
from tandem.backends.mindspore.weight import Weight
from tandem.models.experts import Experts

# How many experts there are, and where the rows of each end.
Groups = tuple[int, Tensor]

_ROWS, _ONE_TENSOR = 0, 3  # of grouped_matmul: rows are in groups, and the result is one tensor


def route(
    x: Tensor, weight: Weight | RouterWeight, experts: Experts, routing: Routing, layer: int
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
    x: Tensor, factors: Tensor, fc1: Stack, fc2: Stack, counts: Sequence[int]
) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    groups = (len(counts), Tensor(np.cumsum(counts), ms.int64))
    gate_up, of_fc1 = fc1.product(x, groups)
    down, of_fc2 = fc2.product(ops.swiglu(gate_up, -1) * factors, groups)

    def backward(gradient: Tensor, x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        active = ops.swiglu(gate_up, -1)
        d_weighted = fc2.backward(gradient, active * factors, of_fc2, groups)
        dots = mint.sum(d_weighted.astype(ms.float32) * active.astype(ms.float32), 1, keepdim=True)
        d_gate_up = ops.auto_generate.swiglu_grad(d_weighted * factors, gate_up, -1)
        return fc1.backward(d_gate_up, x, of_fc1, groups), dots.astype(factors.dtype)

    return down, backward


def sum_rows(x: Tensor, tokens: np.ndarray, count: int) -> Tensor:
    sums = mint.zeros((count, x.shape[1]), dtype=ms.float32)
    return mint.index_add(sums, 0, Tensor(tokens, ms.int32), x.astype(ms.float32)).astype(x.dtype)


def exchange(ranks: Ranks, x: Tensor, between: np.ndarray) -> Tensor:
    send, receive = between[ranks.rank].tolist(), between[:, ranks.rank].tolist()
    received = mint.empty((sum(receive), x.shape[1]), dtype=x.dtype)
    mint.distributed.all_to_all_single(received, x, receive, send, group=ranks.group)
    return received


def grouped(x: Tensor, weight: Weight, groups: Groups) -> Tensor:
    return _grouped(x, _stack(weight, groups), groups[1])


def _stack(weight: Weight, groups: Groups) -> Tensor:
    return weight.value.reshape(groups[0], -1, weight.value.shape[1])


def _grouped(x: Tensor, stack: Tensor, ends: Tensor, *, transposed: bool = True) -> Tensor:
    """Rows of x, group after group, each group times its matrix of the stack, or `transposed`, times its transpose."""
    (result,) = ops.auto_generate.grouped_matmul(
        [x], [stack], group_list=ends, split_item=_ONE_TENSOR, group_type=_ROWS, transpose_b=transposed
    )
    return result


def grouped_backward(gradient: Tensor, x: Tensor, weight: Weight, groups: Groups) -> Tensor:
    """MindSpore documents no grouped product that gives a weight's gradient, but that it differentiates the one above.

    So that runs once more.
    """
    stack, ends = _stack(weight, groups), groups[1]
    if not weight.trained:
        return _grouped(gradient, stack, ends, transposed=False)
    _, pull = ms.vjp(lambda x, stack: _grouped(x, stack, ends), x, stack)
    d_x, d_stack = pull(gradient)
    weight.add_gradient(d_stack.reshape(weight.value.shape))
    return d_x
