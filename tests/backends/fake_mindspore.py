"""A stand-in for MindSpore on an Ascend device, in NumPy: what its operators give, and how often each is called.

Operators check what they are called with as their documentation asks. `test_ascend_kernels.py` compares their names and
parameters with the MindSpore that is installed. Numbers of 16 bits keep the digits of fp32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np


class DType(NamedTuple):
    name: str
    kind: str
    size: int


float32, float16, bfloat16 = DType("float32", "f", 4), DType("float16", "f", 2), DType("bfloat16", "f", 2)
int32, int64 = DType("int32", "i", 4), DType("int64", "i", 8)
uint8, bool_ = DType("uint8", "i", 1), DType("bool", "i", 1)
PRODUCTS = ("matmul", "FlashAttentionScore", "FlashAttentionScoreGrad", "grouped_matmul")
DTYPES = {dtype.name: dtype for dtype in (float32, float16, bfloat16, int32, int64, uint8, bool_)}
HALF = (float16, bfloat16)
MASK = (2048, 2048)


@dataclass
class Record:
    """What the device was asked to do.

    Attributes:
        kernels: calls of operators, by name. Views, and memory without contents, are none.
        documents: of each call of flash attention.
        copies, reads: to the device, and from it.
        memoryless: tensors have shapes alone.
        moved: bytes that kernels read and write, except products and attention.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    documents: list[int] = field(default_factory=list)
    copies: int = 0
    reads: int = 0
    memoryless: bool = False
    moved: int = 0

    def clear(self) -> None:
        self.kernels.clear(), self.documents.clear()
        self.copies = self.reads = self.moved = 0

    def move(self, name: str, *tensors: Tensor) -> None:
        if name not in PRODUCTS:
            self.moved += sum(math.prod(tensor.shape) * tensor.dtype.size for tensor in tensors)


RECORD = Record()


def made(
    name: str, shape: Sequence[int], dtype: DType, inputs: Sequence[Tensor], compute: Callable[..., Any]
) -> Tensor:
    """The result of one kernel. It has numbers where all inputs have."""
    RECORD.kernels[name] += 1
    values = None
    if not RECORD.memoryless and all(tensor.values is not None for tensor in inputs):
        values = np.asarray(
            compute(*(tensor.values for tensor in inputs)), np.float32 if dtype.kind == "f" else np.int64
        )
        assert values.shape == tuple(shape), (name, values.shape, shape)
        values = values if values.flags.owndata and values.flags.writeable else values.copy()
    result = Tensor._of(values, tuple(shape), dtype)
    RECORD.move(name, *inputs, result)
    return result


class Tensor:
    """A tensor on the device. `Tensor(array)` copies from the host."""

    def __init__(self, array: Any, dtype: DType | None = None) -> None:
        array = np.asarray(array)
        RECORD.copies += 1
        self.shape, self.dtype = array.shape, dtype or DTYPES[array.dtype.name]
        self.is_contiguous = True
        self.values = None
        if not RECORD.memoryless:
            self.values = array.astype(np.float32 if self.dtype.kind == "f" else np.int64)

    @classmethod
    def _of(cls, values: np.ndarray | None, shape: tuple[int, ...], dtype: DType, contiguous: bool = True) -> Tensor:
        new = cls.__new__(cls)
        new.values, new.shape, new.dtype, new.is_contiguous = values, shape, dtype, contiguous
        return new

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> Tensor:
        return cls(array)

    def asnumpy(self) -> np.ndarray:
        RECORD.reads += 1
        name = "float32" if self.dtype.kind == "f" else self.dtype.name
        return np.ones(self.shape, name) if self.values is None else self.values.astype(name)

    # --- views

    def reshape(self, *shape: Any) -> Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(self.shape)
        if -1 in shape:
            shape = tuple(size // -math.prod(shape) if length == -1 else length for length in shape)
        assert math.prod(shape) == size, (self.shape, shape)
        source = self.contiguous()
        return Tensor._of(None if source.values is None else source.values.reshape(shape), shape, self.dtype)

    def contiguous(self) -> Tensor:
        return self if self.is_contiguous else made("contiguous", self.shape, self.dtype, [self], np.array)

    def __getitem__(self, key: Any) -> Tensor:
        keys = key if isinstance(key, tuple) else (key,)
        shape = np.broadcast_to(np.empty(()), self.shape)[key].shape
        inner = [one for one in keys[1:] if one != slice(None)]
        values = None if self.values is None else self.values[key]
        return Tensor._of(values, shape, self.dtype, self.is_contiguous and not inner)

    # --- kernels

    def astype(self, dtype: DType) -> Tensor:
        return self if dtype == self.dtype else made("cast", self.shape, dtype, [self], np.array)

    def _with(self, name: str, other: Any, compute: Callable[[Any, Any], Any]) -> Tensor:
        if not isinstance(other, Tensor):
            return made(name, self.shape, self.dtype, [self], lambda values: compute(values, other))
        dtypes = {self.dtype, other.dtype}
        assert len(dtypes) == 1 or float32 in dtypes, dtypes
        dtype = self.dtype if len(dtypes) == 1 else float32
        return made(name, np.broadcast_shapes(self.shape, other.shape), dtype, [self, other], compute)

    def __add__(self, other: Any) -> Tensor:
        return self._with("add", other, np.add)

    def __radd__(self, other: Any) -> Tensor:
        return self._with("add", other, np.add)

    def __sub__(self, other: Any) -> Tensor:
        return self._with("sub", other, np.subtract)

    def __mul__(self, other: Any) -> Tensor:
        return self._with("mul", other, np.multiply)

    def __rmul__(self, other: Any) -> Tensor:
        return self._with("mul", other, np.multiply)

    def __truediv__(self, other: Any) -> Tensor:
        return self._with("div", other, np.divide)

    def __neg__(self) -> Tensor:
        return made("neg", self.shape, self.dtype, [self], np.negative)

    def _changed(self, name: str, compute: Callable[..., Any], *inputs: Tensor) -> Tensor:
        new = made(name, self.shape, self.dtype, [self, *inputs], compute)
        if self.values is not None:
            self.values[...] = new.values
        return self

    def mul_(self, factor: float) -> Tensor:
        return self._changed("mul_", lambda values: values * np.float32(factor))

    def div_(self, other: Tensor) -> Tensor:
        return self._changed("div_", np.divide, other)

    def exp_(self) -> Tensor:
        return self._changed("exp_", np.exp)

    def scatter_add_(self, dim: int, index: Tensor, src: Tensor) -> Tensor:
        assert (dim, index.shape[1], src.dtype) == (1, 1, self.dtype)
        assert index.dtype in (int32, int64)
        return self._changed("scatter_add_", _scatter_add, index, src)

    def copy_(self, source: Tensor) -> Tensor:
        assert source.shape == self.shape
        return self._changed("copy_", lambda _, other: other, source)

    def index_add_(self, dim: int, index: Tensor, source: Tensor) -> Tensor:
        assert (dim, source.dtype) == (0, self.dtype)
        return self._changed("index_add_", _index_add, index, source)

    def sum(self, axis: int) -> Tensor:
        return mint_sum(self, axis)


def _scatter_add(x: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    result = x.copy()
    np.put_along_axis(result, index, np.take_along_axis(x, index, 1) + source, 1)
    return result


def _index_add(x: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    result = x.copy()
    np.add.at(result, index, source)
    return result


# --- mindspore.mint


def _filled(name: str, shape: Sequence[int], value: float, dtype: DType) -> Tensor:
    return made(name, shape, dtype, [], lambda: np.full(shape, value))


def zeros(size: Sequence[int], *, dtype: DType) -> Tensor:
    return _filled("zeros", size, 0.0, dtype)


def ones(size: Sequence[int], *, dtype: DType) -> Tensor:
    return _filled("ones", size, 1.0, dtype)


def full(size: Sequence[int], fill_value: float, *, dtype: DType) -> Tensor:
    return _filled("full", size, fill_value, dtype)


def empty(size: Sequence[int], *, dtype: DType) -> Tensor:
    return Tensor._of(None if RECORD.memoryless else np.full(size, np.nan, np.float32), tuple(size), dtype)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    assert len({tensor.dtype for tensor in tensors}) == 1
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return made("cat", shape, tensors[0].dtype, list(tensors), lambda *values: np.concatenate(values, dim))


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    assert (dim, index.dtype) == (0, int32)
    shape = (*index.shape, *input.shape[1:])
    return made("index_select", shape, input.dtype, [input, index], lambda values, places: values[places])


def index_add(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    assert (dim, index.dtype, source.dtype) == (0, int32, input.dtype)
    return made("index_add", input.shape, input.dtype, [input, index, source], _index_add)


def triu(input: Tensor, diagonal: int = 0) -> Tensor:
    return made("triu", input.shape, input.dtype, [input], lambda values: np.triu(values, diagonal))


def _elementwise(name: str, compute: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: made(name, x.shape, x.dtype, [x], compute)


def _reduced(shape: tuple[int, ...], dim: int | None, keepdim: bool) -> tuple[int, ...]:
    if dim is None:
        return ()
    dim %= len(shape)
    return shape[:dim] + ((1,) if keepdim else ()) + shape[dim + 1 :]


def mint_sum(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    shape = _reduced(input.shape, dim, keepdim)
    return made(
        "sum", shape, input.dtype, [input], lambda values: values.sum(axis=dim, keepdims=keepdim and dim is not None)
    )


def mint_max(input: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    shape = _reduced(input.shape, dim, keepdim)
    largest = made("max", shape, input.dtype, [input], lambda values: values.max(dim, keepdims=keepdim))
    values = None if input.values is None else input.values.argmax(dim, keepdims=keepdim)
    return largest, Tensor._of(values, shape, int64)


def gather(input: Tensor, dim: int, index: Tensor) -> Tensor:
    assert index.dtype in (int32, int64)
    compute = lambda values, places: np.take_along_axis(values, places, dim)  # noqa: E731
    return made("gather", index.shape, input.dtype, [input, index], compute)


def log_softmax(input: Tensor, dim: int | None = None) -> Tensor:
    def compute(values: np.ndarray) -> np.ndarray:
        shifted = values - values.max(dim, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(dim, keepdims=True))

    return made("log_softmax", input.shape, input.dtype, [input], compute)


def vector_norm(x: Tensor, ord: float = 2, dim: int | None = None) -> Tensor:
    assert ord == 2
    return made(
        "vector_norm", _reduced(x.shape, dim, False), x.dtype, [x], lambda values: np.sqrt((values**2).sum(dim))
    )


# --- mindspore.ops


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
    shape = (*input.shape[:-1], input.shape[-1] // 2)

    def compute(values: np.ndarray) -> np.ndarray:
        gate, up = np.split(values, 2, -1)
        return gate / (1 + np.exp(-gate)) * up

    return made("swiglu", shape, input.dtype, [input], compute)


def swiglu_grad(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    assert (dim, grad_output.dtype) == (-1, input.dtype)

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


@dataclass
class GroupedProduct:
    """What `vjp` needs of a call."""

    x: Tensor
    stack: Tensor
    ends: np.ndarray
    transposed: bool


_calls: list[GroupedProduct] = []


def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    bias: None = None,
    scale: None = None,
    offset: None = None,
    antiquant_scale: None = None,
    antiquant_offset: None = None,
    group_list: Any = None,
    split_item: int = 0,
    group_type: int = -1,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> tuple[Tensor]:
    (rows,), (stack,) = x, weight
    assert (split_item, group_type, transpose_a) == (3, 0, False)
    assert rows.dtype == stack.dtype
    assert (group_list.dtype, group_list.shape) == (int64, stack.shape[:1])
    columns = stack.shape[1 if transpose_b else 2]
    assert rows.shape[1] == stack.shape[2 if transpose_b else 1]
    ends = group_list.values
    _calls.append(GroupedProduct(rows, stack, ends, transpose_b))

    def compute(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        parts = np.split(values, ends[:-1])
        return np.concatenate([part @ (w.T if transpose_b else w) for part, w in zip(parts, weights)])

    return (made("grouped_matmul", (rows.shape[0], columns), rows.dtype, [rows, stack], compute),)


def vjp(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """MindSpore's, of a function that is one grouped product."""
    _calls.clear()
    result = function(*inputs)
    (call,) = _calls

    def pull(gradient: Tensor) -> tuple[Tensor, Tensor]:
        def of_x(g: np.ndarray, weights: np.ndarray) -> np.ndarray:
            parts = np.split(g, call.ends[:-1])
            return np.concatenate([part @ (w if call.transposed else w.T) for part, w in zip(parts, weights)])

        def of_stack(g: np.ndarray, x: np.ndarray) -> np.ndarray:
            pairs = zip(np.split(g, call.ends[:-1]), np.split(x, call.ends[:-1]))
            return np.stack([a.T @ b if call.transposed else b.T @ a for a, b in pairs])

        d_x = made("grouped_matmul", call.x.shape, call.x.dtype, [gradient, call.stack], of_x)
        return d_x, made("grouped_matmul", call.stack.shape, call.stack.dtype, [gradient, call.x], of_stack)

    return result, pull


OPERATORS = {
    "RmsNorm": RmsNorm,
    "RmsNormGrad": RmsNormGrad,
    "swiglu_grad": swiglu_grad,
    "rotary_position_embedding": rotary_position_embedding,
    "FlashAttentionScore": FlashAttentionScore,
    "FlashAttentionScoreGrad": FlashAttentionScoreGrad,
    "AdamW": AdamW,
    "grouped_matmul": grouped_matmul,
}
MINT = {
    "zeros": zeros,
    "ones": ones,
    "full": full,
    "empty": empty,
    "cat": cat,
    "index_select": index_select,
    "index_add": index_add,
    "triu": triu,
    "gather": gather,
    "sum": mint_sum,
    "max": mint_max,
    "log": _elementwise("log", np.log),
    "square": _elementwise("square", np.square),
}


def _nothing(*_: Any, **__: Any) -> None:
    return None


def modules() -> dict[str, ModuleType]:
    """The modules of MindSpore that Tandem imports."""

    def module(name: str, **contents: Any) -> ModuleType:
        new = ModuleType(name)
        vars(new).update(contents)
        return new

    distributed = module("mindspore.mint.distributed.distributed", get_cache_group_rank=_nothing)
    collectives = module("mindspore.mint.distributed", distributed=distributed)
    functional = SimpleNamespace(log_softmax=log_softmax)
    mint = module(
        "mindspore.mint",
        **MINT,
        nn=SimpleNamespace(functional=functional),
        linalg=SimpleNamespace(vector_norm=vector_norm),
        distributed=collectives,
    )
    primitives = {name: lambda *_, **__: _nothing for name in ("Adam", "AllReduce", "BatchMatMul")}
    ops = module(
        "mindspore.ops",
        auto_generate=SimpleNamespace(**OPERATORS),
        swiglu=swiglu,
        MatMul=MatMul,
        Primitive=object,
        **primitives,
    )
    communication = module(
        "mindspore.communication", GlobalComm=SimpleNamespace(WORLD_COMM_GROUP="hccl"), create_group=_nothing
    )
    whole = module(
        "mindspore",
        Tensor=Tensor,
        Type=DType,
        mint=mint,
        ops=ops,
        vjp=vjp,
        communication=communication,
        set_context=_nothing,
        set_device=_nothing,
        get_context=lambda _: "Ascend",
        PYNATIVE_MODE=1,
        device_context=SimpleNamespace(ascend=SimpleNamespace(is_available=lambda: True)),
        hal=SimpleNamespace(get_device_name=lambda _: "Ascend910B2"),
        **DTYPES,
    )
    found = (whole, mint, ops, collectives, distributed, communication)
    return {one.__name__: one for one in found}
