"""The kernels on CPU except attention, loss and optimizer: products, embedding, RMSNorm and SwiGLU.

MindSpore's element-wise CPU kernels broadcast and reduce slowly, so these run in NumPy, over the memory of the tensors.
With fp16, input and output are fp16, and everything in between is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.mindspore.compute.cpu.products import matmul
from tandem.backends.mindspore.compute.cpu.threads import split_work
from tandem.backends.mindspore.weight import Pullback, Weight, empty, single, written_in_single
from tandem.models.config import ModelConfig
from tandem.models.rotary import cos_sin

# Rows worked on at a time, so that intermediate results stay in a core's cache.
BLOCK = 64


def to_device(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of a micro-batch, by name, as the other kernels take them: here, as they are."""
    return dict(arrays)


def angles(config: ModelConfig, positions: np.ndarray, on_device: Any, dtype: ms.Type) -> tuple[Tensor, Tensor]:
    """cos and sin of each token's angles, fp32 [t, kv_channels].

    Args:
        on_device: the same positions, as `to_device` has made them.
        dtype: of the model.
    """
    cos, sin = cos_sin(config, positions)
    return Tensor.from_numpy(cos), Tensor.from_numpy(sin)


def product(a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
    """The product of two matrices of one dtype, in that dtype. Of fp16 it is computed in fp32."""
    wide = matmul(_in_single(a), _in_single(b), transpose_b=transpose_b)
    if a.dtype == ms.float32:
        return wide
    result, values = empty(*wide.shape, dtype=a.dtype)
    values[...] = wide.asnumpy()
    return result


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient [t, o] transposed times x [t, i]: [o, i], fp32, and not rounded to fp16 in between."""
    return matmul(_in_single(gradient), _in_single(x), transpose_a=True)


def _in_single(x: Tensor) -> Tensor:
    return x if x.dtype == ms.float32 else Tensor.from_numpy(single(x.asnumpy()))


def embedding(tokens: np.ndarray, weight: Weight) -> tuple[Tensor, Pullback]:
    """Rows of weight [v, h] for tokens [t]: [t, h]. The pullback's result must not be used."""
    vectors, rows = empty(len(tokens), weight.value.shape[1], dtype=weight.value.dtype)
    rows[...] = weight.value.asnumpy()[tokens]

    def backward(gradient: Tensor) -> Tensor:
        if not weight.trained:
            return gradient
        buffer = weight.gradient_rows()
        if not weight.has_gradient:
            fill_zero(buffer)
        for token, row in zip(tokens, gradient.asnumpy()):
            buffer[token] += row
        weight.has_gradient = True
        return gradient

    return vectors, backward


def select_rows(x: Tensor, rows: np.ndarray) -> tuple[Tensor, Pullback]:
    """x [t, h] -> x[rows]; `rows` are distinct."""
    selected, values = empty(len(rows), x.shape[1], dtype=x.dtype)
    values[...] = x.asnumpy()[rows]
    count = x.shape[0]
    return selected, lambda gradient: place_rows(gradient, rows, count)


def place_rows(x: Tensor, rows: np.ndarray, count: int) -> Tensor:
    """[count, h] with x [len(rows), h] at `rows` and zeros elsewhere."""
    result, values = empty(count, x.shape[1], dtype=x.dtype)
    values.fill(0)
    values[rows] = x.asnumpy()
    return result


def rows(x: Tensor, start: int, stop: int) -> Tensor:
    """x[start:stop], in the same memory."""
    return Tensor.from_numpy(x.asnumpy()[start:stop])


def rms_norm(x: Tensor, weight: Weight, epsilon: float) -> tuple[Tensor, Pullback]:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension of [t, h] (arXiv 1910.07467)."""
    rows, gamma = x.asnumpy(), weight.value.asnumpy()
    result, normed = empty(*x.shape, dtype=x.dtype)
    rstd = np.empty((len(rows), 1), np.float32)

    def forward_part(part: slice) -> None:
        with written_in_single(normed[part]) as out:
            rstd[part] = normalise(single(rows[part]), gamma, epsilon, out)

    split_work(forward_part, len(rows), rows.size)

    def backward(gradient: Tensor) -> Tensor:
        d_normed = gradient.asnumpy()
        d_x, d_rows = empty(*x.shape, dtype=x.dtype)

        def backward_part(part: slice) -> np.ndarray:
            with written_in_single(d_rows[part]) as out:
                return normalise_backward(single(d_normed[part]), single(rows[part]), rstd[part], gamma, out)

        d_gamma = split_work(backward_part, len(rows), rows.size)
        weight.add_gradient(Tensor.from_numpy(sum(d_gamma[1:], d_gamma[0])))
        return d_x

    return result, backward


def normalise(x: np.ndarray, gamma: np.ndarray, epsilon: float, out: np.ndarray) -> np.ndarray:
    """RMSNorm over the last dimension of x [..., n] into `out`; returns 1 / rms, [..., 1]."""
    mean_square = np.einsum("...n,...n->...", x, x)[..., None] / np.float32(x.shape[-1])
    rstd: np.ndarray = 1 / np.sqrt(mean_square + np.float32(epsilon))
    np.multiply(x, rstd, out=out)
    out *= gamma
    return rstd


def normalise_backward(
    d_normed: np.ndarray, x: np.ndarray, rstd: np.ndarray, gamma: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """The gradient of `normalise` with respect to x [..., n] into `out`; returns that of gamma, [n].

    With y = x * rstd and g = d_normed * gamma: d_x = rstd * (g - y * mean(g * y)).
    """
    y = np.empty(x.shape, np.float32)
    np.multiply(x, rstd, out=y)
    d_gamma: np.ndarray = np.einsum("rn,rn->n", d_normed.reshape(-1, len(gamma)), y.reshape(-1, len(gamma)))
    np.multiply(d_normed, gamma, out=out)
    y *= np.einsum("...n,...n->...", out, y)[..., None] / np.float32(len(gamma))
    out -= y
    out *= rstd
    return d_gamma


def swiglu(gate_up: Tensor) -> tuple[Tensor, Pullback]:
    """silu(gate) * up of [t, 2f], gate before up: [t, f] (arXiv 2002.05202)."""
    rows = gate_up.asnumpy()
    tokens, width = rows.shape[0], rows.shape[1] // 2
    result, values = empty(tokens, width, dtype=gate_up.dtype)

    def forward_block(block: slice) -> None:
        gate, up = single(rows[block, :width]), single(rows[block, width:])
        with written_in_single(values[block]) as out:
            np.negative(gate, out=out)
            np.exp(out, out=out)
            out += 1
            np.divide(gate, out, out=out)
            out *= up

    _over_blocks(forward_block, tokens, values.size)

    def backward(gradient: Tensor) -> Tensor:
        d_values = gradient.asnumpy()
        d_gate_up, d_rows = empty(*gate_up.shape, dtype=gate_up.dtype)

        def backward_block(block: slice) -> None:
            with written_in_single(d_rows[block]) as d_block:
                differentiate(single(rows[block]), single(d_values[block]), d_block)

        def differentiate(block: np.ndarray, d_out: np.ndarray, d_block: np.ndarray) -> None:
            gate, up = block[:, :width], block[:, width:]
            d_gate, d_up = d_block[:, :width], d_block[:, width:]
            sigmoid = np.negative(gate)
            np.exp(sigmoid, out=sigmoid)
            sigmoid += 1
            np.reciprocal(sigmoid, out=sigmoid)
            silu = gate * sigmoid
            np.multiply(d_out, silu, out=d_up)
            # silu' = sigmoid + silu * (1 - sigmoid)
            np.subtract(1, sigmoid, out=d_gate)
            d_gate *= silu
            d_gate += sigmoid
            d_gate *= up
            d_gate *= d_out

        _over_blocks(backward_block, tokens, values.size)
        return d_gate_up

    return result, backward


def _over_blocks(function: Callable[[slice], None], rows: int, elements: int) -> None:
    def run(part: slice) -> None:
        for start in range(part.start, part.stop, BLOCK):
            function(slice(start, min(start + BLOCK, part.stop)))

    split_work(run, rows, elements)


def zeros(shape: tuple[int, ...]) -> Tensor:
    """An fp32 tensor of zeros."""
    tensor, values = empty(*shape)
    fill_zero(values)
    return tensor


def fill_zero(values: np.ndarray) -> None:
    """Fill with zeros, in place, on all cores."""
    split_work(lambda part: values[part].fill(0), len(values), values.size)
