"""Arithmetic with hand-written backward passes. Little is saved, and weight gradients are added in place.

Shapes: t tokens, n and k features. Activations are in the parameters' dtype; norms and gradients of weights are fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import silu

# A product for a weight gradient is formed in pieces of at most this many numbers, which are added while in cache.
# glibc reuses blocks of this size; blocks above 32 MiB are new pages from the kernel each time.
PIECE = 2**20


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
        _add_to(*self._open(), gradient, 1.0)

    def add_product(self, gradient: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale * gradient^T x: gradient [t, n] of a linear layer's output, x [t, k] its input."""
        value, first = self._open()
        step = max(1, PIECE // x.shape[1])
        for start in range(0, gradient.shape[1], step):
            piece = matmul(gradient[:, start : start + step].t(), x.t())
            _add_to(value[start : start + step], first, piece, scale)

    def add_rows(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add gradients [t, k] to the rows [t] of this one; rows may repeat."""
        self.value.index_add_(0, rows, gradients.float())


def _add_to(target: torch.Tensor, first: bool, gradient: torch.Tensor, scale: float) -> None:
    if first:
        torch.mul(gradient.float(), scale, out=target)  # in fp32, as below
    else:
        target.add_(gradient, alpha=scale)


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
    """x [t, k] times w [n, k] transposed: [t, n], in new memory.

    In fp32 on CPU this uses oneDNN, which takes the widest vectors of every x86 processor. The MKL behind
    `torch.nn.functional.linear` takes half their width on AMD's. oneDNN does not accept empty matrices.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and _HAS_ONEDNN and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.nn.functional.linear(x, w)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: torch.Tensor, weight: Weight, bias: Weight | None = None) -> torch.Tensor:
    """x [t, k] -> [t, n] with weight [n, k], and bias [n] where there is one."""
    return _Linear.apply(x, weight, bias)


def embedding(tokens: torch.Tensor, weight: Weight, absent: torch.Tensor | None = None) -> torch.Tensor:
    """tokens [t] -> their rows of weight, [t, k]; zeros for those marked in `absent` [t]."""
    return _Embedding.apply(tokens, weight, absent)


def rms_norm(x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [t, 2n], gate then up -> silu(gate) * up, [t, n] (arXiv 2002.05202)."""
    return _SwiGLU.apply(x)


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
    return _RotaryHeads.apply(qkv, q_weight, k_weight, eps, cos, sin)


def recomputed(cheap: Callable[..., Any], then: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """then(cheap(*inputs)). The backward pass calls `cheap` again, instead of keeping its results.

    `cheap` returns one tensor or several; `then` takes them as its arguments.
    """
    outputs = _as_tuple(cheap(*inputs))
    if not torch.is_grad_enabled():
        return then(*outputs)
    recomputation = _Recomputation(cheap, [x.detach() for x in inputs])
    numbers = {output.untyped_storage().data_ptr(): number for number, output in enumerate(outputs)}

    def pack(saved: torch.Tensor) -> Any:
        number = numbers.get(saved.untyped_storage().data_ptr())
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
        if ctx.bias is not None and ctx.bias.main_grad is not None:
            ctx.bias.main_grad.add(gradient.sum(0, dtype=torch.float32))
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
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, scale = ctx.saved_tensors
        return _rms_norm_backward(gradient, x, scale, ctx.weight), None, None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """fp32 [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _rms_norm_backward(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The gradient of x. The weight's gradient is added to its buffer. With y = x * scale (scale is `_inverse_rms`):

    dweight = sum(gradient * y) over tokens, dx = scale * (gradient * weight - y * mean(gradient * weight * y)).
    """
    y = x * scale
    product = gradient * y
    if weight.main_grad is not None:
        weight.main_grad.add(product.reshape(-1, x.shape[-1]).sum(0))
    mean = product.mul_(weight).mean(-1, keepdim=True)
    return (gradient * weight).sub_(y.mul_(mean)).mul_(scale).to(x.dtype)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, dim=-1)
        torch.mul(gradient, silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=dgate)
        return dx


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
        queries, keys, values = _heads(qkv)
        rotated = []
        for x, weight in ((queries, q_weight), (keys, k_weight)):
            y = x if weight is None else (x * _inverse_rms(x, eps)).mul_(weight)
            rotated.append(_rotate(y, cos, sin, torch.empty(x.shape, dtype=x.dtype, device=x.device)))
        return rotated[0], rotated[1], values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        *heads, _ = _heads(qkv)
        *targets, dvalues = _heads(dqkv)
        dvalues.copy_(gradients[2])
        for x, weight, gradient, target in zip(heads, ctx.weights, gradients, targets):
            if weight is None:
                _rotate(gradient, cos, -sin, target)
            else:
                rotated = _rotate(gradient, cos, -sin, torch.empty_like(gradient))
                target.copy_(_rms_norm_backward(rotated, x, _inverse_rms(x, ctx.eps), weight))
        return dqkv, None, None, None, None, None


def _heads(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of [t, groups, queries per group + 2, d]: queries, key, value of each group."""
    return qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1:]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of channels of x [t, g, a, d] by its angle, into `out`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out
