"""Routers and experts on Ascend NPUs: as many operators for 128 experts as for one, and nothing that the host reads.

How many rows an expert has is known on the device alone. Only where ranks share experts the host reads how many rows
go between them: the exchange wants to know.

Written from MindSpore's documentation; there was no NPU to run it on. The CPU's functions document each of them.
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from tandem.backends.capacity import Capacity
from tandem.backends.experts import Dispatch, Routing, Sorted
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.compute.npu import product, weight_gradient
from tandem.backends.mindspore.expert_adapters import RouterWeight, Stack
from tandem.backends.mindspore.weight import Weight
from tandem.models.experts import Experts

ROWS, SUMMED = 0, 2  # group_type: what the groups divide, of a product [m, k] [k, n]: m or k


def route(
    x: Tensor, weight: Weight | RouterWeight, experts: Experts, routing: Routing, layer: int
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    exact, count = routing.settings.moe_router_dtype == "fp32", x.shape[0]
    rows, values = (x.astype(ms.float32), weight.value.astype(ms.float32)) if exact else (x, weight.value)
    logits = product(rows, values, transpose_b=True).astype(ms.float32)
    # Of equal ones, `topk` takes those with smaller numbers.
    _, chosen = mint.topk(logits, experts.moe_router_topk, -1)
    total, probabilities = mint.logsumexp(logits, 1, True), mint.softmax(logits, 1)
    picked = mint.gather(probabilities, 1, chosen)
    norms = mint.sum(picked, 1, True) if experts.norm_topk_prob else None
    real = slice(0, routing.tokens)
    routing.counts[layer] = _counts(chosen[real].reshape(-1), experts.num_experts)
    routing.mass[layer] = mint.sum(probabilities[real], 0)
    routing.squares[layer] = mint.sum(mint.square(total[real]))

    def backward(gradient: Tensor, x: Tensor) -> Tensor:
        d_chosen = gradient.astype(ms.float32)
        if norms is not None:
            d_chosen = (d_chosen - mint.sum(d_chosen * picked, 1, True) / norms) / norms
        d_probabilities = mint.scatter(mint.zeros(probabilities.shape, dtype=ms.float32), 1, chosen, d_chosen)
        if (slopes := routing.slopes(layer)) is not None:
            d_probabilities = d_probabilities + slopes
        d_logits = d_probabilities - mint.sum(d_probabilities * probabilities, 1, True)
        if routing.slope_of_z:
            d_logits = d_logits + total * (2 * routing.slope_of_z)
        d_logits = d_logits * probabilities
        d_logits = _padded(d_logits[real], count).astype(x.dtype)
        if weight.trained:
            weight.add_gradient(weight_gradient(d_logits, x).astype(ms.float32))
        return product(d_logits, weight.value)

    factors = picked if norms is None else picked / norms
    return factors.astype(x.dtype), chosen, backward


def _padded(x: Tensor, count: int, first: int = 0) -> Tensor:
    """x [n, k] from row `first` on, and zeros before and behind: [count, k]."""
    sizes = (first, count - first - x.shape[0])
    before, behind = ([mint.zeros((size, x.shape[1]), dtype=x.dtype)] if size else [] for size in sizes)
    return mint.cat([*before, x, *behind], 0) if before or behind else x


def _numbers(count: int) -> Tensor:
    """0, 1, 2 and so on. `arange` takes no 0."""
    return mint.arange(count) if count else mint.empty((0,), dtype=ms.int64)


def _counts(numbers: Tensor, experts: int) -> Tensor:
    """How often each expert is among numbers [n], fp32 [E]: exact, and not `bincount`, for which the host waits."""
    return mint.zeros((experts,), dtype=ms.float32).scatter_add_(0, numbers, mint.ones(numbers.shape, dtype=ms.float32))


def taken_choices(capacity: Capacity, chosen: Tensor, factors: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    parts = []
    for first, last, limit in capacity.limits(tokens):
        flat, numbers = chosen[first:last].reshape(-1), None
        count = flat.shape[0]
        if capacity.by_probability:
            _, numbers = mint.topk(factors[first:last].reshape(-1).astype(ms.float32), count)
            flat = mint.index_select(flat, 0, numbers)
        experts, order = mint.sort(flat, stable=True)
        places = _numbers(count) - mint.searchsorted(experts, experts)
        slots = order if numbers is None else mint.index_select(numbers, 0, order)
        is_taken = mint.less(places, limit).astype(ms.float32)
        of_part = mint.scatter(mint.zeros((count,), dtype=ms.float32), 0, slots, is_taken)
        parts.append(of_part.reshape(last - first, chosen.shape[1]))
    taken = _padded(mint.cat(parts, 0), chosen.shape[0])
    return taken.astype(factors.dtype), mint.sum(taken)


def limited(factors: Tensor, taken: Tensor) -> Tensor:
    return factors * taken


def sort_choices(chosen: Tensor, experts: int, first: int, last: int) -> Sorted:
    flat, width = chosen[first:last].reshape(-1), chosen.shape[1]
    _, order = mint.sort(flat, stable=True)
    places = mint.scatter(mint.zeros(flat.shape, dtype=ms.int64), 0, order, _numbers(flat.shape[0]))
    slots = order + first * width if first else order
    counts = _counts(flat, experts).astype(ms.int64)
    return Sorted(slots, mint.floor_divide(slots, width), places.reshape(last - first, width), first, counts)


def groups(counts: Tensor) -> Tensor:
    """Where each expert's rows end, int64 [E]."""
    return mint.cumsum(counts, 0)


def dispatch(ranks: Ranks, counts: Tensor) -> Dispatch:
    held = counts.shape[0] // ranks.size
    rows = mint.cat(ranks.gather(counts), 0).reshape(ranks.size, ranks.size, held)
    between = mint.sum(rows, 2).asnumpy()
    here, received = rows[:, ranks.rank].contiguous(), between[:, ranks.rank]
    order = _sorted_by_expert(here, int(received.sum()), held)
    return Dispatch(between[ranks.rank].tolist(), received.tolist(), order, mint.sum(here, 0), between)


def _sorted_by_expert(here: Tensor, count: int, held: int) -> Tensor:
    """The `count` rows that came, here[r, e] from rank r for expert e, sorted by expert: the number of each."""
    ends = mint.cumsum(here.reshape(-1), 0)
    experts = mint.remainder(mint.searchsorted(ends, _numbers(count), right=True), held)
    return mint.sort(experts, stable=True)[1]


def expert_mlp(
    x: Tensor, factors: Tensor, fc1: Stack, fc2: Stack, groups: Tensor
) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    gate_up, of_fc1 = fc1.product(x, groups)
    down, of_fc2 = fc2.product(_swiglu(gate_up) * factors, groups)

    def backward(gradient: Tensor, x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        active = _swiglu(gate_up)
        d_weighted = fc2.backward(gradient, active * factors, of_fc2, groups)
        dots = mint.sum(d_weighted.astype(ms.float32) * active.astype(ms.float32), 1, keepdim=True)
        d_gate_up = _swiglu_grad(d_weighted * factors, gate_up)
        return fc1.backward(d_gate_up, x, of_fc1, groups), dots.astype(factors.dtype)

    return down, backward


def _swiglu(x: Tensor) -> Tensor:
    """The operator takes no tensor without rows, which a rank's experts may have."""
    return ops.swiglu(x, -1) if x.shape[0] else mint.empty((0, x.shape[1] // 2), dtype=x.dtype)


def _swiglu_grad(gradient: Tensor, x: Tensor) -> Tensor:
    return ops.auto_generate.swiglu_grad(gradient, x, -1) if x.shape[0] else x


def sum_rows(x: Tensor, sent: Sorted, count: int) -> Tensor:
    """Without additions of any order: sums are fp32, and the same each time."""
    tokens, width = sent.places.shape
    rows = mint.index_select(x, 0, sent.places.reshape(-1)).reshape(tokens, width, x.shape[1])
    return _padded(mint.sum(rows, 1, dtype=ms.float32).astype(x.dtype), count, sent.first)


def exchange(ranks: Ranks, x: Tensor, between: np.ndarray) -> Tensor:
    send, receive = between[ranks.rank].tolist(), between[:, ranks.rank].tolist()
    received = mint.empty((sum(receive), x.shape[1]), dtype=x.dtype)
    mint.distributed.all_to_all_single(received, x, receive, send, group=ranks.group)
    return received


def grouped(x: Tensor, weight: Weight, groups: Tensor) -> Tensor:
    return _grouped(x, mint.transpose(_stack(weight, groups), 1, 2), groups)


def grouped_backward(gradient: Tensor, x: Tensor, weight: Weight, groups: Tensor) -> Tensor:
    if weight.trained and x.shape[0]:  # the gradient of an expert without rows is zeros
        d_stack = _gmm(mint.transpose(gradient, 0, 1), x, groups, SUMMED)
        weight.add_gradient(d_stack.reshape(weight.value.shape))
    return _grouped(gradient, _stack(weight, groups), groups)


def _stack(weight: Weight, groups: Tensor) -> Tensor:
    return weight.value.reshape(groups.shape[0], -1, weight.value.shape[1])


def _grouped(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Rows of x, group after group, each group times its matrix of the stack."""
    return _gmm(x, stack, ends, ROWS) if x.shape[0] else mint.empty((0, stack.shape[2]), dtype=x.dtype)


def _gmm(x: Tensor, weight: Tensor, ends: Tensor, group_type: int) -> Tensor:
    (result,) = ops.function.math_func.gmm([x], [weight], group_list=ends, group_type=group_type, group_list_type=0)
    return result
