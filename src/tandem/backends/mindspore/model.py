"""The decoder: forward and backward over the tokens of one micro-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import Tensor

from tandem.backends.adapters import Dropout
from tandem.backends.experts import Routing
from tandem.backends.mindspore.adapters import Linear
from tandem.backends.mindspore.experts import Mixture
from tandem.backends.mindspore.inputs import Inputs
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Pullback, Weight
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix

Layer = Callable[[Tensor], "tuple[Tensor, Pullback]"]
# What `Kernels.attention` is, after the number of the layer.
Attention = Callable[..., "tuple[Tensor, Pullback]"]


def linear(layer: Linear, dropout: Dropout | None, x: Tensor) -> tuple[Tensor, Pullback]:
    """The linear layer of x [t, i]: [t, o]."""
    product, kept = layer.forward(x, dropout)
    return product, lambda gradient: layer.backward(gradient, x, kept, dropout)


def linear_after(layer: Linear, dropout: Dropout | None, function: Layer, x: Tensor) -> tuple[Tensor, Pullback]:
    """`linear` of function(x).

    Only x is kept: the function is cheap, and is computed again in the backward pass.
    """
    product, kept = layer.forward(function(x)[0], dropout)

    def backward(gradient: Tensor) -> Tensor:
        value, pull = function(x)
        return pull(layer.backward(gradient, value, kept, dropout))

    return product, backward


def mixture_after(layer: Mixture, routing: Routing, function: Layer, x: Tensor) -> tuple[Tensor, Pullback]:
    """The experts of function(x), which is computed again in the backward pass."""
    output, kept = layer.forward(function(x)[0], routing)

    def backward(gradient: Tensor) -> Tensor:
        value, pull = function(x)
        return pull(layer.backward(gradient, value, kept))

    return output, backward


def recomputed(layer: Layer) -> Layer:
    """The same function, but it keeps only its input, and runs again in the backward pass."""

    def forward(x: Tensor) -> tuple[Tensor, Pullback]:
        def backward(gradient: Tensor) -> Tensor:
            _, pull = layer(x)
            return pull(gradient)

        return layer(x)[0], backward

    return forward


def chained(steps: Iterable[Layer], x: Tensor, differentiable: bool = True) -> tuple[Tensor, Pullback]:
    """One function after another. Nothing is kept for the pullback when not `differentiable`."""
    pulls = []
    for step in steps:
        x, pull = step(x)
        if differentiable:
            pulls.append(pull)

    def backward(gradient: Tensor) -> Tensor:
        while pulls:
            gradient = pulls.pop()(gradient)  # popped, so that what it kept is freed after the call
        return gradient

    return x, backward


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A chunk of this rank's stage and slice of a decoder: embedding, layers, final norm. The loss applies the head.

    Attributes:
        config: with this rank's numbers of heads and groups.
        layers: the chunk's layers, as numbered in the whole model. `recompute_layers` counts from the first.
        first, last: whether the chunk begins with the embedding, and whether it ends with the final norm.
        weights: by global name.
        linears: the layers' linear layers, by the global names of their weights.
        mixtures: the experts of those layers that have them.
        watchers: of all chunks of the rank; called with the global name of each module that has run, and its output.
    """

    config: ModelConfig
    layers: Sequence[int]
    first: bool
    last: bool
    weights: dict[str, Weight]
    linears: dict[str, Linear]
    mixtures: dict[int, Mixture]
    kernels: Kernels
    tensor: TensorParallel
    recompute_layers: int
    watchers: list[Callable[[str, Tensor], None]]

    @property
    def head(self) -> Weight:
        """[this rank's rows of the vocabulary, h]"""
        return self.weights[EMBEDDING if self.config.tied else OUTPUT]

    def forward(
        self,
        inputs: Inputs,
        x: Tensor | None,
        differentiable: bool,
        attention: Attention | None = None,
    ) -> tuple[Tensor, Pullback]:
        """The chunk's output from x [t, h], the output of the chunk before (None for the first chunk).

        The last chunk returns the input of the head, at the inputs' `rows`: [len(rows), h].

        The second result takes the output's gradient, accumulates the gradients of all weights, and returns the
        gradient of x (undefined on the first chunk). It may be called once, and only when `differentiable`.

        Args:
            attention: default: within documents.
        """
        attend = functools.partial(attention or self._within_documents, documents=inputs.documents, config=self.config)
        dropout, routing = inputs.dropout, inputs.routing
        steps = [self._layer(place, layer, attend, dropout, routing) for place, layer in enumerate(self.layers)]
        if self.first:
            embedding = self._watched(EMBEDDING, lambda _: self.tensor.embedding(inputs.lookup, self._embedding))
            steps = [embedding, self.tensor.leave, *steps]
        if self.last:
            norm = self._watched(FINAL_NORM, self._norm(FINAL_NORM))
            select = [] if inputs.rows is None else [functools.partial(self.kernels.select_rows, rows=inputs.rows)]
            # Where each rank has its own tokens, it normalises these. Otherwise only those that count are normalised.
            steps += [norm, self.tensor.enter, *select] if self.tensor.sequence else [*select, norm, self.tensor.enter]
        return chained(steps, x, differentiable)

    def _watched(self, name: str, step: Layer) -> Layer:
        """The same step, but watchers see its output. `name` is that of the module, or of a tensor in it."""
        if not self.watchers:
            return step

        def run(x: Tensor) -> tuple[Tensor, Pullback]:
            output, pull = step(x)
            for watch in self.watchers:
                watch(name.removesuffix(".weight").removesuffix("."), output)
            return output, pull

        return run

    @property
    def _embedding(self) -> Weight:
        return self.weights[EMBEDDING]

    def _within_documents(self, layer: int, *inputs: Any, **others: Any) -> tuple[Tensor, Pullback]:
        return self.kernels.attention(*inputs, **others)

    def _layer(
        self, place: int, layer: int, attend: Attention, dropout: Dropout | None, routing: Routing | None
    ) -> Layer:
        step = functools.partial(self._decoder_layer, layer=layer, attend=attend, dropout=dropout, routing=routing)
        function = self._watched(layer_prefix(layer), step)
        return recomputed(function) if place < self.recompute_layers else function

    def _decoder_layer(
        self, x: Tensor, layer: int, attend: Attention, dropout: Dropout | None, routing: Routing | None
    ) -> tuple[Tensor, Pullback]:
        prefix = layer_prefix(layer)
        attention = prefix + "self_attention."
        weights, kernels, tensor, linears = self.weights, self.kernels, self.tensor, self.linears

        qkv, pull_qkv = linear_after(
            linears[attention + "linear_qkv.weight"], dropout, self._entering(prefix + "input_layernorm.weight"), x
        )
        q_norm, k_norm = weights.get(attention + "q_layernorm.weight"), weights.get(attention + "k_layernorm.weight")
        mixed, pull_mixed = attend(layer, qkv, q_norm, k_norm)
        project = functools.partial(linear, linears[attention + "linear_proj.weight"], dropout)
        projected, pull_projected = chained([project, tensor.leave], mixed)
        middle = x + projected
        entering = self._entering(prefix + "pre_mlp_layernorm.weight")
        if layer in self.mixtures:
            assert routing is not None
            block = [functools.partial(mixture_after, self.mixtures[layer], routing, entering)]
        else:
            gate_up = functools.partial(linear_after, linears[prefix + "mlp.linear_fc1.weight"], dropout, entering)
            down = functools.partial(linear_after, linears[prefix + "mlp.linear_fc2.weight"], dropout, kernels.swiglu)
            block = [gate_up, down]
        mlp, pull_mlp = chained([*block, tensor.leave], middle)

        def backward(gradient: Tensor) -> Tensor:
            gradient = gradient + pull_mlp(gradient)
            return gradient + pull_qkv(pull_mixed(pull_projected(gradient)))

        return middle + mlp, backward

    def _entering(self, norm: str) -> Layer:
        """A norm, and then the gathering of all tokens of its result."""
        return functools.partial(chained, [self._norm(norm), self.tensor.enter])

    def _norm(self, name: str) -> Layer:
        return functools.partial(self.kernels.rms_norm, weight=self.weights[name], epsilon=self.config.norm_epsilon)
