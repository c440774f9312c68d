"""Routers and experts on CPU, in NumPy. With fp16, everything in between is fp32.

Shapes: t tokens, h hidden size, E experts, k of them for a token, f inner width of an expert, n rows sorted by expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from mindspore import Tensor

from tandem.backends.capacity import Capacity
from tandem.backends.experts import Dispatch, Routing, Sorted
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.compute.cpu import products
from tandem.backends.mindspore.compute.cpu.functional import product, swiglu, weight_gradient
from tandem.backends.mindspore.expert_adapters import RouterWeight, Stack
from tandem.backends.mindspore.weight import Weight, empty, single
from tandem.models.experts import Experts


def route(
    x: Tensor, weight: Weight | RouterWeight, experts: Experts, routing: Routing, layer: int
) -> tuple[Tensor, np.ndarray, Callable[[Tensor, Tensor], Tensor]]:
    """The factors of each token's experts [t, k], their numbers [t, k], and a pullback.

    Of experts with equal logits, those with the lower numbers are chosen. The pullback takes the factors' gradient and
    x again, adds the balancing losses, and returns the gradient of x.
    """
    exact = routing.settings.moe_router_dtype == "fp32"
    if exact:
        logits = products.matmul(_in_single(x), _in_single(weight.value), transpose_b=True).asnumpy()
    else:
        logits = single(product(x, weight.value, transpose_b=True).asnumpy())
    chosen = np.ascontiguousarray(np.argsort(-logits, axis=1, kind="stable")[:, : experts.moe_router_topk])
    largest = logits.max(1, keepdims=True)
    probabilities = np.exp(logits - largest)
    totals = probabilities.sum(1, keepdims=True)
    probabilities /= totals
    log_sum_exp = (largest + np.log(totals))[:, 0]
    picked = np.take_along_axis(probabilities, chosen, 1)
    norms = picked.sum(1, keepdims=True) if experts.norm_topk_prob else np.float32(1)
    real = slice(0, routing.tokens)
    routing.counts[layer] = np.bincount(chosen[real].reshape(-1), minlength=experts.num_experts).astype(np.float32)
    routing.mass[layer] = probabilities[real].sum(0)
    routing.squares[layer] = np.square(log_sum_exp[real]).sum()

    def backward(gradient: Tensor, x: Tensor) -> Tensor:
        d_chosen = single(gradient.asnumpy())
        if experts.norm_topk_prob:
            d_chosen = (d_chosen - (d_chosen * picked).sum(1, keepdims=True) / norms) / norms
        d_probabilities = np.zeros_like(probabilities)
        np.put_along_axis(d_probabilities, chosen, d_chosen, 1)
        slopes = routing.slopes(layer)
        if slopes is not None:
            d_probabilities[real] += slopes
        d_logits = probabilities * (d_probabilities - (d_probabilities * probabilities).sum(1, keepdims=True))
        if routing.slope_of_z:
            d_logits[real] += probabilities[real] * (np.float32(2 * routing.slope_of_z) * log_sum_exp[real, None])
        d_logits = Tensor(d_logits).astype(x.dtype)
        if weight.trained:
            weight.add_gradient(weight_gradient(d_logits, x))
        return product(d_logits, weight.value)

    return Tensor(picked / norms).astype(x.dtype), chosen, backward


def taken_choices(capacity: Capacity, chosen: np.ndarray, factors: Tensor, tokens: int) -> tuple[np.ndarray, int]:
    """Which of the choices [t, k] experts with a capacity take, and how many that are. `factors`: of the choices."""
    taken = capacity.taken(chosen, single(factors.asnumpy()), tokens)
    return taken, int(taken.sum())


def limited(factors: Tensor, taken: np.ndarray) -> Tensor:
    """Factors of choices [t, k], with zeros for those that experts do not take."""
    return Tensor(np.where(taken, single(factors.asnumpy()), np.float32(0))).astype(factors.dtype)


def sort_choices(chosen: np.ndarray, experts: int, first: int, last: int) -> Sorted:
    """The choices [t, k] of the tokens from `first` to `last`, sorted by expert."""
    flat, width = chosen[first:last].reshape(-1), chosen.shape[1]
    slots = np.argsort(flat, kind="stable") + first * width
    return Sorted(slots, slots // width, None, first, np.bincount(flat, minlength=experts))


def groups(counts: np.ndarray) -> list[int]:
    """What the products of experts need to know, from the number of rows of each [E]."""
    return counts.tolist()


def dispatch(ranks: Ranks, counts: np.ndarray) -> Dispatch:
    """How rows travel between ranks, from those that this rank has for each expert, [E]."""
    gathered = ranks.gather(Tensor(counts.astype(np.float32)))
    return Dispatch.of(np.stack([of_rank.asnumpy() for of_rank in gathered]).astype(np.int64), ranks.rank)


def expert_mlp(
    x: Tensor, factors: Tensor, fc1: Stack, fc2: Stack, counts: Sequence[int]
) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """W2 (factor * silu(gate) * up), with (gate, up) = W1 x: x [n, h], factors [n, 1] -> [n, h]; and a pullback.

    The pullback takes the result's gradient, x and the factors, and returns the gradients of both.

    Args:
        fc1, fc2: of all experts, one below the other: [E 2f, h] and [E h, f].
        counts: rows of each expert.
    """
    gate_up, of_fc1 = fc1.product(x, counts)
    down, of_fc2 = fc2.product(_times(swiglu(gate_up)[0], factors), counts)

    def backward(gradient: Tensor, x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        active, pull = swiglu(gate_up)
        d_weighted = fc2.backward(gradient, _times(active, factors), of_fc2, counts)
        dots = np.einsum("nf,nf->n", single(d_weighted.asnumpy()), single(active.asnumpy()))
        d_gate_up = pull(_times(d_weighted, factors))
        return fc1.backward(d_gate_up, x, of_fc1, counts), Tensor(dots[:, None]).astype(factors.dtype)

    return down, backward


def sum_rows(x: Tensor, sent: Sorted, count: int) -> Tensor:
    """[count, h] with the sum of those rows of x [n, h] that belong to each token; zeros for a token without any."""
    sums, tokens = np.zeros((count, x.shape[1]), np.float32), sent.tokens
    rows = x.asnumpy()
    # An expert's tokens are in order, and each is there once.
    ends = [*(np.flatnonzero(np.diff(tokens) <= 0) + 1).tolist(), len(tokens)]
    for start, stop in zip([0, *ends], ends):
        sums[tokens[start:stop]] += rows[start:stop]
    return Tensor(sums).astype(x.dtype)


def exchange(ranks: Ranks, x: Tensor, between: np.ndarray) -> Tensor:
    """The rows that come from each rank, rank after rank. Of this rank's rows x [n, k], the first go to the first rank.

    MindSpore has no AllToAll on CPU: every rank gets all rows, and takes its own.

    Args:
        between: rows from each rank to each.
    """
    most, own = int(between.sum(1).max()), x.asnumpy()
    received, values = empty(int(between[:, ranks.rank].sum()), x.shape[1], dtype=x.dtype)
    if most:
        message, rows = empty(most, x.shape[1], dtype=x.dtype)
        rows[: len(own)] = own
        place = 0
        for source, of_rank in enumerate(ranks.gather(message)):
            first, count = int(between[source, : ranks.rank].sum()), int(between[source, ranks.rank])
            values[place : place + count] = of_rank.asnumpy()[first : first + count]
            place += count
    return received


def grouped(x: Tensor, weight: Weight, counts: Sequence[int], *, transposed: bool = False) -> Tensor:
    """Each expert's rows of x [n, i] times its weight, in the dtype of x: [n, o].

    Args:
        weight: of all experts, [E o, i], one below the other; with `transposed`, [E i, o], and its transpose counts.
        counts: rows of each expert.
    """
    start = time.perf_counter()
    rows, stack = x.asnumpy(), weight.value.asnumpy()
    size, first = len(stack) // len(counts), 0
    result, values = empty(len(rows), stack.shape[1] if transposed else size, dtype=x.dtype)
    for expert, count in enumerate(counts):
        if count:
            part = single(stack[expert * size : (expert + 1) * size])
            values[first : first + count] = single(rows[first : first + count]) @ (part if transposed else part.T)
            first += count
    products.seconds[products.LINEAR] += time.perf_counter() - start
    return result


def grouped_backward(gradient: Tensor, x: Tensor, weight: Weight, counts: Sequence[int]) -> Tensor:
    """The gradient of x from that of `grouped`. Adds that of the weight."""
    add_grouped_gradient(weight, gradient, x, counts)
    return grouped(gradient, weight, counts, transposed=True)


def add_grouped_gradient(weight: Weight, gradient: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    """Add to each expert's part of the gradient its rows of `gradient` [n, o] transposed times those of x [n, i]."""
    if not weight.trained:
        return
    start = time.perf_counter()
    rows, inputs, buffer = gradient.asnumpy(), x.asnumpy(), weight.gradient_rows()
    size, first = len(buffer) // len(counts), 0
    for expert, count in enumerate(counts):
        target = buffer[expert * size : (expert + 1) * size]
        part = slice(first, first + count)
        if not weight.has_gradient:
            np.matmul(single(rows[part]).T, single(inputs[part]), out=target)  # of no rows: zeros
        elif count:
            target += single(rows[part]).T @ single(inputs[part])
        first += count
    weight.has_gradient = True
    products.seconds[products.LINEAR] += time.perf_counter() - start


def _times(x: Tensor, factors: Tensor) -> Tensor:
    """x [n, f] times factors [n, 1], in the dtype of x."""
    result, values = empty(*x.shape, dtype=x.dtype)
    values[...] = single(x.asnumpy()) * single(factors.asnumpy())
    return result


def _in_single(x: Tensor) -> Tensor:
    return Tensor.from_numpy(single(x.asnumpy()))
