"""The stand-in's tensors and functions of `mindspore.mint` (`fake_mindspore`), in NumPy, and the record of their calls.

Numbers of 16 bits keep the digits of fp32.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class DType(NamedTuple):
    name: str
    kind: str
    size: int


float32, float16, bfloat16 = DType("float32", "f", 4), DType("float16", "f", 2), DType("bfloat16", "f", 2)
int32, int64 = DType("int32", "i", 4), DType("int64", "i", 8)
uint8, bool_ = DType("uint8", "i", 1), DType("bool", "i", 1)
PRODUCTS = ("matmul", "FlashAttentionScore", "FlashAttentionScoreGrad", "gmm")
DTYPES = {dtype.name: dtype for dtype in (float32, float16, bfloat16, int32, int64, uint8, bool_)}


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
    lock: threading.Lock = field(default_factory=threading.Lock)  # ranks may be threads

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
        with RECORD.lock:
            RECORD.copies += 1
        self.shape, self.dtype = array.shape, dtype or DTYPES[array.dtype.name]
        self.is_contiguous, self.is_transposed = True, False
        self.values = None
        if not RECORD.memoryless:
            self.values = array.astype(np.float32 if self.dtype.kind == "f" else np.int64)

    @classmethod
    def _of(cls, values: np.ndarray | None, shape: tuple[int, ...], dtype: DType, contiguous: bool = True) -> Tensor:
        new = cls.__new__(cls)
        new.values, new.shape, new.dtype, new.is_contiguous = values, shape, dtype, contiguous
        new.is_transposed = False
        return new

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> Tensor:
        return cls(array)

    def asnumpy(self) -> np.ndarray:
        with RECORD.lock:
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
        assert (dim, index.shape, src.dtype) == (len(self.shape) - 1, src.shape, self.dtype)
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
    np.add.at(result, (*np.indices(index.shape, sparse=True)[:-1], index), source)
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


def ones_like(input: Tensor) -> Tensor:
    return _filled("ones_like", input.shape, 1.0, input.dtype)


def full(size: Sequence[int], fill_value: float, *, dtype: DType) -> Tensor:
    return _filled("full", size, fill_value, dtype)


def empty(size: Sequence[int], *, dtype: DType) -> Tensor:
    values = np.full(size, np.nan, np.float32) if dtype.kind == "f" else np.full(size, -1, np.int64)
    return Tensor._of(None if RECORD.memoryless else values, tuple(size), dtype)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    assert len({tensor.dtype for tensor in tensors}) == 1
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return made("cat", shape, tensors[0].dtype, list(tensors), lambda *values: np.concatenate(values, dim))


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    assert dim == 0
    assert index.dtype in (int32, int64)
    shape = (*index.shape, *input.shape[1:])
    return made("index_select", shape, input.dtype, [input, index], lambda values, places: values[places])


def index_add(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    assert (dim, source.dtype) == (0, input.dtype)
    assert index.dtype in (int32, int64)
    return made("index_add", input.shape, input.dtype, [input, index, source], _index_add)


def triu(input: Tensor, diagonal: int = 0) -> Tensor:
    return made("triu", input.shape, input.dtype, [input], lambda values: np.triu(values, diagonal))


def elementwise(name: str, compute: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: made(name, x.shape, x.dtype, [x], compute)


def _reduced(shape: tuple[int, ...], dim: int | None, keepdim: bool) -> tuple[int, ...]:
    if dim is None:
        return ()
    dim %= len(shape)
    return shape[:dim] + ((1,) if keepdim else ()) + shape[dim + 1 :]


def mint_sum(input: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    shape = _reduced(input.shape, dim, keepdim)
    compute = lambda values: values.sum(axis=dim, keepdims=keepdim and dim is not None)  # noqa: E731
    return made("sum", shape, dtype or input.dtype, [input], compute)


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


def softmax(input: Tensor, dim: int) -> Tensor:
    def compute(values: np.ndarray) -> np.ndarray:
        exponentials = np.exp(values - values.max(dim, keepdims=True))
        return exponentials / exponentials.sum(dim, keepdims=True)

    return made("softmax", input.shape, input.dtype, [input], compute)


def logsumexp(input: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    def compute(values: np.ndarray) -> np.ndarray:
        largest = values.max(dim, keepdims=True)
        return (largest + np.log(np.exp(values - largest).sum(dim, keepdims=True))).reshape(shape)

    shape = _reduced(input.shape, dim, keepdim)
    return made("logsumexp", shape, input.dtype, [input], compute)


def transpose(input: Tensor, dim0: int, dim1: int) -> Tensor:
    assert input.is_contiguous, "a view of a view: the stand-in does not say how its numbers lie"
    shape = list(input.shape)
    shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
    values = None if input.values is None else input.values.swapaxes(dim0, dim1)
    view = Tensor._of(values, tuple(shape), input.dtype, contiguous=False)
    view.is_transposed = {dim0, dim1} == {len(shape) - 2, len(shape) - 1}
    return view


# --- of whole numbers


def arange(end: int) -> Tensor:
    assert end > 0, "MindSpore's arange takes no 0"
    return made("arange", (end,), int64, [], lambda: np.arange(end))


def _ordered(name: str, input: Tensor, count: int, indices: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """Values of the last dimension in an order, and their places: one kernel."""
    shape = (*input.shape[:-1], count)
    places = None if input.values is None else indices(input.values)[..., :count]
    values = made(name, shape, input.dtype, [input], lambda values: np.take_along_axis(values, places, -1))
    return values, Tensor._of(None if values.values is None else places, shape, int64)


def topk(input: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Of equal numbers, those with smaller places."""
    assert dim == -1
    return _ordered("topk", input, k, lambda values: np.argsort(-values, -1, kind="stable"))


def sort(input: Tensor, *, stable: bool = False) -> tuple[Tensor, Tensor]:
    assert input.dtype in (int32, int64), "MindSpore warns of sorting fp32"
    assert stable
    return _ordered("sort", input, input.shape[-1], lambda values: np.argsort(values, -1, kind="stable"))


def searchsorted(sorted_sequence: Tensor, values: Tensor, *, right: bool = False) -> Tensor:
    assert sorted_sequence.dtype == values.dtype == int64
    compute = lambda ends, numbers: np.searchsorted(ends, numbers, "right" if right else "left")  # noqa: E731
    return made("searchsorted", values.shape, int64, [sorted_sequence, values], compute)


def cumsum(input: Tensor, dim: int) -> Tensor:
    return made("cumsum", input.shape, input.dtype, [input], lambda values: np.cumsum(values, dim))


def floor_divide(input: Tensor, other: int) -> Tensor:
    return made("floor_divide", input.shape, input.dtype, [input], lambda values: values // other)


def remainder(input: Tensor, other: int) -> Tensor:
    return made("remainder", input.shape, input.dtype, [input], lambda values: values % other)


def less(input: Tensor, other: int) -> Tensor:
    return made("less", input.shape, bool_, [input], lambda values: values < other)


def scatter(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    assert (dim, src.dtype, src.shape) == (len(input.shape) - 1, input.dtype, index.shape)
    assert index.dtype in (int32, int64)

    def compute(x: np.ndarray, places: np.ndarray, source: np.ndarray) -> np.ndarray:
        result = x.copy()
        np.put_along_axis(result, places, source, dim)
        return result

    return made("scatter", input.shape, input.dtype, [input, index, src], compute)


def vector_norm(x: Tensor, ord: float = 2, dim: int | None = None) -> Tensor:
    assert ord == 2
    return made(
        "vector_norm", _reduced(x.shape, dim, False), x.dtype, [x], lambda values: np.sqrt((values**2).sum(dim))
    )
