"""Arithmetic with hand-written backward passes. Little is saved, and weight gradients are added in place.

Shapes: t tokens, n and k features. Activations are in the parameters' dtype; norms and gradients of weights are fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from tandem.backends.torch.compute.cpu import add_to, split_heads
from tandem.backends.torch.compute.sets import kernels_of


class Gradient(ABC):
    """The gradient of one weight, fp32, which backward passes add to.

    The first contribution overwrites, so the buffer is never filled with zeros first.
    """

    @abstractmethod
    def _open(self) -> tuple[torch.Tensor, bool]:
        """The tensor to write to, and whether this is the first contribution."""

    @property
    def value(self) -> torch.Tensor:
        self.add_nothing()
        return self._open()[0]

    def add_nothing(self) -> None:
        """Fill the gradient with zeros, if nothing was added yet."""
        value, first = self._open()
        if first:
            value.zero_()

    def add(self, gradient: torch.Tensor) -> None:
        add_to(*self._open(), gradient, 1.0)

    def add_product(self, gradient: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale * gradient^T x: gradient [t, n] of a linear layer's output, x [t, k] its input."""
        kernels_of(x.device).add_product(*self._open(), gradient, x, scale)

    def add_grouped_product(self, gradient: torch.Tensor, x: torch.Tensor, groups: Any) -> None:
        """The same for a weight that is a stack of equal blocks: `groups` tells which rows belong to each of them."""
        kernels_of(x.device).add_grouped_product(*self._open(), gradient, x, groups)

    def add_rows(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add gradients [t, k] to the rows [t] of this one; rows may repeat."""
        self.value.index_add_(0, rows, gradients.float())

    def blocks(self, count: int) -> list[Gradient]:
        """The gradients of `count` equal blocks of rows. Once one of them is used, all others must be, too."""
        opened = cache(self._open)
        return [_Block(opened, number, count) for number in range(count)]


class _Block(Gradient):
    """The gradient of one block of rows.

    Args:
        opened: the whole gradient, and whether nothing was added to it before.
    """

    def __init__(self, opened: Callable[[], tuple[torch.Tensor, bool]], number: int, count: int) -> None:
        self._opened, self._number, self._count = opened, number, count
        self._is_new = True

    def _open(self) -> tuple[torch.Tensor, bool]:
        whole, first = self._opened()
        first, self._is_new = first and self._is_new, False
        size = len(whole) // self._count
        return whole[self._number * size : (self._number + 1) * size], first


class GradientBuffer(Gradient):
    """A gradient with its own memory, for the sum over the micro-batches of a step.

    Args:
        room: rows to allocate; the gradient takes the first ones. Default: the weight's rows.
    """

    def __init__(self, weight: torch.Tensor, room: int | None = None) -> None:
        rows = len(weight)
        self._storage = torch.empty((room or rows, *weight.shape[1:]), dtype=torch.float32, device=weight.device)
        self._storage[rows:] = 0.0
        self._value = self._storage[:rows]
        self._empty = True

    @property
    def whole(self) -> torch.Tensor:
        """The gradient, and the rows of padding below it."""
        self.add_nothing()
        return self._storage

    def clear(self) -> None:
        self._empty = True

    def _open(self) -> tuple[torch.Tensor, bool]:
        first, self._empty = self._empty, False
        return self._value, first


class Weight(torch.nn.Parameter):
    """A parameter. It is trained when it has a `main_grad`. Autograd adds nothing to its `grad`."""

    main_grad: Gradient | None = None


def new_weight(*shape: int, dtype: torch.dtype, device: torch.device) -> Weight:
    """A weight of undefined values."""
    return Weight(torch.empty(shape, dtype=dtype, device=device))


def matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [t, k] times w [n, k] transposed: [t, n], in new memory."""
    return kernels_of(x.device).product(x, w)


def linear(x: torch.Tensor, weight: Weight, bias: Weight | None = None) -> torch.Tensor:
    """x [t, k] -> [t, n] with weight [n, k], and bias [n] where there is one."""
    return applied(_Linear, x, weight, bias)


def embedding(tokens: torch.Tensor, weight: Weight, absent: torch.Tensor | None = None) -> torch.Tensor:
    """tokens [t] -> their rows of weight, [t, k]; zeros for those marked in `absent` [t]."""
    return applied(_Embedding, tokens, weight, absent)


def rms_norm(x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    return applied(_RMSNorm, x, weight, eps)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [t, 2n], gate then up -> silu(gate) * up, [t, n] (arXiv 2002.05202)."""
    return applied(_SwiGLU, x)


def rotary_heads(
    qkv: torch.Tensor,
    q_weight: Weight | None,
    k_weight: Weight | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take heads out of qkv [t, groups, queries per group + 2, d]; normalise and rotate queries and keys.

    `q_weight` and `k_weight` [d] are of the norm over each head, or None for no norm. `cos` and `sin` are
    [t, 1, d / 2] (arXiv 2104.09864; channel i pairs with i + d / 2).

    Returns:
        Queries [t, groups, queries per group, d], keys and values [t, groups, 1, d]; values are a view of `qkv`.
    """
    return applied(_RotaryHeads, qkv, q_weight, k_weight, eps, cos, sin)


def recomputed(cheap: Callable[..., Any], then: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """then(cheap(*inputs)). The backward pass calls `cheap` again, instead of keeping its results.

    `cheap` returns one tensor or several; `then` takes them as its arguments.
    """
    outputs = _as_tuple(cheap(*inputs))
    if not torch.is_grad_enabled():
        return then(*outputs)
    recomputation = _Recomputation(cheap, [x.detach() for x in inputs])
    numbers = {output.untyped_storage()._cdata: number for number, output in enumerate(outputs)}

    def pack(saved: torch.Tensor) -> Any:
        number = numbers.get(saved.untyped_storage()._cdata)
        return saved if number is None else (number, saved.size(), saved.stride(), saved.storage_offset())

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        number, *place = packed
        return recomputation.outputs()[number].as_strided(*place)

    with saved_tensors_hooks(pack, unpack):
        return then(*outputs)


class _Recomputation:
    """Outputs that are computed when they are needed, and kept as long as autograd keeps this object."""

    def __init__(self, function: Callable[..., Any], inputs: list[torch.Tensor]) -> None:
        self._function = function
        self._inputs = inputs
        self._outputs: tuple[torch.Tensor, ...] | None = None

    @torch.no_grad()
    def outputs(self) -> tuple[torch.Tensor, ...]:
        if self._outputs is None:
            self._outputs = _as_tuple(self._function(*self._inputs))
        return self._outputs


def _as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


class _Forgets:
    """The context of a function that is not differentiated."""

    def save_for_backward(self, *_: torch.Tensor | None) -> None:
        pass


def applied(function: type[Function], *inputs: Any) -> Any:
    """The function's value. Without gradients autograd is not asked: it takes longer than a token's arithmetic."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_Forgets(), *inputs)


# A weight is kept as an attribute of the context, not among the saved tensors: recomputation would return a detached
# copy of it, without its `main_grad`.


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        product = matmul(x, weight)
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.weight.main_grad is not None:
            ctx.weight.main_grad.add_product(gradient, x)
        add_bias(ctx.bias, gradient)
        return matmul(gradient, ctx.weight.t()), None, None


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: Weight, absent: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(tokens, absent)
        ctx.weight = weight
        rows = torch.nn.functional.embedding(tokens, weight)
        return rows if absent is None else rows.masked_fill_(absent[:, None], 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        tokens, absent = ctx.saved_tensors
        if ctx.weight.main_grad is not None:
            present = gradient if absent is None else gradient.masked_fill(absent[:, None], 0.0)
            ctx.weight.main_grad.add_rows(tokens, present)
        return None, None, None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
        y, scale = kernels_of(x.device).rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, scale = ctx.saved_tensors
        dx, dweight = kernels_of(x.device).rms_norm_backward(gradient, x, scale, ctx.weight, _is_trained(ctx.weight))
        _add_gradient(ctx.weight, dweight)
        return dx, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return kernels_of(x.device).swiglu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return kernels_of(x.device).swiglu_backward(gradient, x)


class _RotaryHeads(Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        q_weight: Weight | None,
        k_weight: Weight | None,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(qkv, cos, sin)
        ctx.weights, ctx.eps = (q_weight, k_weight), eps
        queries, keys = kernels_of(qkv.device).rotary_heads(qkv, q_weight, k_weight, eps, cos, sin)
        return queries, keys, split_heads(qkv)[2]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        dqkv, *dweights = kernels_of(qkv.device).rotary_heads_backward(
            gradients, qkv, *ctx.weights, ctx.eps, cos, sin, _is_trained(ctx.weights[0])
        )
        for weight, dweight in zip(ctx.weights, dweights):
            _add_gradient(weight, dweight)
        return dqkv, None, None, None, None, None


def add_bias(bias: Weight | None, gradient: torch.Tensor) -> None:
    """Add the bias's gradient, where there is a bias that is trained, from that of what it was added to, [t, n]."""
    if bias is not None and bias.main_grad is not None:
        bias.main_grad.add(gradient.sum(0, dtype=torch.float32))


def _is_trained(weight: Weight | None) -> bool:
    return weight is not None and weight.main_grad is not None


def _add_gradient(weight: Weight | None, gradient: torch.Tensor | None) -> None:
    if weight is not None and weight.main_grad is not None:
        assert gradient is not None
        weight.main_grad.add(gradient)
