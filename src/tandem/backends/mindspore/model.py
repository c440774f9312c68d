"""The decoder: forward and backward over the tokens of one micro-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from tandem.backends.mindspore.attention import Documents
from tandem.backends.mindspore.device import Kernels
from tandem.backends.mindspore.weight import Pullback, Weight
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix

Layer = Callable[[Tensor], "tuple[Tensor, Pullback]"]

_product = ops.MatMul()
_product_ta = ops.MatMul(transpose_a=True)
_product_tb = ops.MatMul(transpose_b=True)


def linear(x: Tensor, weight: Weight) -> tuple[Tensor, Pullback]:
    """x [t, i] times weight [o, i] transposed: [t, o]."""

    def backward(gradient: Tensor) -> Tensor:
        weight.add_gradient(_product_ta(gradient, x))
        return _product(gradient, weight.value)

    return _product_tb(x, weight.value), backward


def linear_after(function: Layer, x: Tensor, weight: Weight, bias: Weight | None = None) -> tuple[Tensor, Pullback]:
    """`linear` of function(x), plus bias [o] where there is one, keeping x alone: the cheap function is computed
    again in the backward pass."""

    def backward(gradient: Tensor) -> Tensor:
        value, pull = function(x)
        weight.add_gradient(_product_ta(gradient, value))
        if bias is not None:
            bias.add_gradient(gradient.astype(ms.float32).sum(axis=0))
        return pull(_product(gradient, weight.value))

    product = _product_tb(function(x)[0], weight.value)
    return product if bias is None else product + bias.value, backward


def recomputed(layer: Layer) -> Layer:
    """The same function, keeping its input alone and running again in the backward pass."""

    def forward(x: Tensor) -> tuple[Tensor, Pullback]:
        def backward(gradient: Tensor) -> Tensor:
            _, pull = layer(x)
            return pull(gradient)

        return layer(x)[0], backward

    return forward


class Decoder:
    """Embedding, decoder layers and final norm; the loss applies the head."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Weight], kernels: Kernels, recompute_layers: int
    ) -> None:
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self.recompute_layers = recompute_layers

    @property
    def head(self) -> Weight:
        """[v, h]"""
        return self.weights[EMBEDDING if self.config.tied else OUTPUT]

    def forward(
        self, micro_batch: MicroBatch, rows: np.ndarray, differentiable: bool
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """What the head takes at the given rows of the micro-batch: [len(rows), h].

        The second result takes that tensor's gradient and accumulates all weights'. It may be called once, and never
        when not `differentiable`: then nothing is kept for it.
        """
        documents = Documents.of(self.config, micro_batch)
        steps: list[Layer] = [
            *(self._layer(index, documents) for index in range(self.config.num_layers)),
            functools.partial(self.kernels.select_rows, rows=rows),
            self._norm(FINAL_NORM),
        ]
        x, pull = self.kernels.embedding(micro_batch.tokens, self.weights[EMBEDDING])
        pulls = [pull]
        for step in steps:
            x, pull = step(x)
            if differentiable:
                pulls.append(pull)

        def backward(gradient: Tensor) -> None:
            while pulls:
                gradient = pulls.pop()(gradient)  # popped, so that what it kept is freed when it is done

        return x, backward

    def _layer(self, index: int, documents: Documents) -> Layer:
        layer = functools.partial(self._decoder_layer, index=index, documents=documents)
        return recomputed(layer) if index < self.recompute_layers else layer

    def _decoder_layer(self, x: Tensor, index: int, documents: Documents) -> tuple[Tensor, Pullback]:
        prefix = layer_prefix(index)
        attention = prefix + "self_attention."
        weights, kernels = self.weights, self.kernels

        qkv, pull_qkv = linear_after(
            self._norm(prefix + "input_layernorm.weight"),
            x,
            weights[attention + "linear_qkv.weight"],
            weights.get(attention + "linear_qkv.bias"),
        )
        q_norm, k_norm = weights.get(attention + "q_layernorm.weight"), weights.get(attention + "k_layernorm.weight")
        mixed, pull_mixed = kernels.attention(qkv, q_norm, k_norm, documents, self.config)
        projected, pull_projected = linear(mixed, weights[attention + "linear_proj.weight"])
        middle = x + projected
        gate_up, pull_gate_up = linear_after(
            self._norm(prefix + "pre_mlp_layernorm.weight"), middle, weights[prefix + "mlp.linear_fc1.weight"]
        )
        mlp, pull_mlp = linear_after(kernels.swiglu, gate_up, weights[prefix + "mlp.linear_fc2.weight"])

        def backward(gradient: Tensor) -> Tensor:
            gradient = gradient + pull_gate_up(pull_mlp(gradient))
            return gradient + pull_qkv(pull_mixed(pull_projected(gradient)))

        return middle + mlp, backward

    def _norm(self, name: str) -> Layer:
        return functools.partial(self.kernels.rms_norm, weight=self.weights[name], epsilon=self.config.norm_epsilon)
