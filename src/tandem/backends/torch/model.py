"""The decoder of every family, or one pipeline chunk and tensor slice of it, under Megatron-core's names.

Shapes: t tokens of documents laid end to end, h hidden size. Modules are built from a config with this rank's heads and
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tandem.backends.adapters import LocalAdapter, Switch
from tandem.backends.torch.adapters import Adapted, adapted_linear, attach, factors_of
from tandem.backends.torch.experts import ExpertRanks, MixtureOfExperts
from tandem.backends.torch.functional import (
    Weight,
    embedding,
    linear,
    new_weight,
    recomputed,
    rms_norm,
    rotary_heads,
    swiglu,
)
from tandem.backends.torch.inputs import Inputs
from tandem.backends.torch.tensor_parallel import TensorParallel, entered_linear
from tandem.models.config import ModelConfig
from tandem.models.tensors import layer_prefix
from tandem.parallel.layout import Slot


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one pipeline stage, and whether they begin or end the model."""

    slots: tuple[Slot, ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class Build:
    """What every module is built from: the config of this rank's slice, dtype and device of weights, the tensor ranks.

    Attributes:
        adapters: this rank's, by the global name of the weight that they add to.
        switch: turns them on and off.
        shard: called with each layer, and then with the model, as soon as it is built.
        experts: the ranks that share the experts of layers.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    tensor: TensorParallel | None
    adapters: Mapping[str, Sequence[LocalAdapter]] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)
    shard: Callable[[nn.Module], None] | None = None
    experts: ExpertRanks = field(default_factory=ExpertRanks)

    def linear(self, inputs: int, outputs: int, *, bias: bool = False) -> Linear:
        return Linear(inputs, outputs, self.dtype, self.device, bias)

    def adapted(self, name: str, inputs: int, outputs: int, *, bias: bool = False, columns: bool = False) -> Linear:
        """The linear layer with this global name, and its adapters. `columns`: ranks hold columns of its weight."""
        weight = f"{name}.weight"
        if not self.adapters.get(weight):
            return self.linear(inputs, outputs, bias=bias)
        ranks = self.tensor if columns else None
        dora = self.config.lora is not None and self.config.lora.use_dora
        layer = Linear(inputs, outputs, self.dtype, self.device, bias)
        return AdaptedLinear(layer, weight, self.adapters[weight], ranks, self.switch, dora=dora)

    def entering(self, name: str, inputs: int, outputs: int, *, bias: bool = False) -> Linear:
        """The first linear layer of a block. Without adapters, it enters the block by itself between tensor ranks."""
        layer = self.adapted(name, inputs, outputs, bias=bias)
        if self.tensor is None or isinstance(layer, AdaptedLinear):
            return layer
        return EnteredLinear(layer, self.tensor)

    def norm(self, size: int) -> RMSNorm:
        return RMSNorm(size, self.config.norm_epsilon, self.dtype, self.device)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, bias: bool = False) -> None:
        super().__init__()
        self.weight = new_weight(outputs, inputs, dtype=dtype, device=device)
        self.bias = new_weight(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class EnteredLinear(Linear):
    """A linear layer that takes what `TensorParallel.enter` does.

    Args:
        layer: takes its weights over.
    """

    def __init__(self, layer: Linear, tensor: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.tensor = layer.weight, layer.bias, tensor

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return entered_linear(x, self.weight, self.bias, self.tensor)


class AdaptedLinear(Linear):
    """A linear layer with adapters. Their weights have the names that the layout gives them.

    Args:
        layer: takes its weights over.
        name: the weight's global name.
        columns: the ranks that hold the other columns of the weight; None where this rank holds all.
    """

    def __init__(
        self,
        layer: Linear,
        name: str,
        adapters: Sequence[LocalAdapter],
        columns: TensorParallel | None,
        switch: Switch,
        *,
        dora: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = layer.weight, layer.bias
        self.name, self.adapters, self.columns, self.switch = name, adapters, columns, switch
        attach(self, self.weight, adapters, dora=dora)

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if not self.switch.on:
            return super().forward(x, inputs)
        factors = factors_of(self, self.adapters)
        return adapted_linear(x, Adapted(self.name, self.weight, self.bias, factors, self.columns, inputs.dropout))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = new_weight(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class WordEmbeddings(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        rows, hidden = build.config.vocab_size, build.config.hidden_size
        self.weight = new_weight(rows, hidden, dtype=build.dtype, device=build.device)
        self.tensor = build.tensor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tensor is None:
            return embedding(tokens, self.weight)
        rows, absent = self.tensor.outside(tokens, len(self.weight))
        return self.tensor.leave(embedding(rows, self.weight, absent))


class SelfAttention(nn.Module):
    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        self.layer, prefix = layer, f"{layer_prefix(layer)}self_attention."
        config = build.config
        head, heads, groups = config.kv_channels, config.num_attention_heads, config.num_query_groups
        self.group_shape = (-1, heads // groups + 2, head)
        self.eps = config.norm_epsilon
        qkv, hidden = (heads + 2 * groups) * head, config.hidden_size
        self.linear_qkv = build.entering(f"{prefix}linear_qkv", hidden, qkv, bias=config.add_qkv_bias)
        self.linear_proj = build.adapted(f"{prefix}linear_proj", heads * head, hidden, columns=True)
        self.enters = isinstance(self.linear_qkv, EnteredLinear)
        self.q_layernorm, self.k_layernorm = (build.norm(head) if config.qk_layernorm else None for _ in range(2))

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        qkv = self.linear_qkv(x, inputs).unflatten(1, self.group_shape)  # [t, groups, queries per group + 2, d]
        q_weight, k_weight = (
            norm.weight if norm is not None else None for norm in (self.q_layernorm, self.k_layernorm)
        )

        def heads(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return rotary_heads(qkv, q_weight, k_weight, self.eps, inputs.cos, inputs.sin)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return inputs.attention(self.layer, q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))

        return self.linear_proj(recomputed(heads, attend, qkv), inputs)


class MLP(nn.Module):
    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        hidden, ffn = build.config.hidden_size, build.config.ffn_hidden_size
        self.linear_fc1 = build.entering(f"{prefix}linear_fc1", hidden, 2 * ffn)
        self.linear_fc2 = build.adapted(f"{prefix}linear_fc2", ffn, hidden, columns=True)
        self.enters = isinstance(self.linear_fc1, EnteredLinear)

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return recomputed(swiglu, partial(self.linear_fc2, inputs=inputs), self.linear_fc1(x, inputs))


class TransformerLayer(nn.Module):
    """Attention and MLP (or experts), each with a norm before it and a residual around it.

    Args:
        layer: its number in the whole model.
        recompute: the forward pass keeps only its input, and is computed again in the backward pass.
    """

    def __init__(self, build: Build, layer: int, *, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.input_layernorm = build.norm(build.config.hidden_size)
        self.self_attention = SelfAttention(build, layer)
        self.pre_mlp_layernorm = build.norm(build.config.hidden_size)
        self.mlp: MLP | MixtureOfExperts = (
            MLP(build, f"{layer_prefix(layer)}mlp.")
            if build.config.experts_in(layer) is None
            else MixtureOfExperts(
                build.config, layer, build.experts, build.dtype, build.device, build.adapters, build.switch
            )
        )
        self.tensor = build.tensor
        if build.shard is not None:
            build.shard(self)

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, inputs, use_reentrant=True, preserve_rng_state=False)
        return self._forward(x, inputs)

    def _forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        x = self._block(self.input_layernorm, self.self_attention, x, inputs)
        return self._block(self.pre_mlp_layernorm, self.mlp, x, inputs)

    def _block(
        self, norm: RMSNorm, block: SelfAttention | MLP | MixtureOfExperts, x: torch.Tensor, inputs: Inputs
    ) -> torch.Tensor:
        """x + block(norm(x)). Tensor ranks gather the norm's tokens, and sum the parts that their blocks compute."""
        tensor, of_inputs = self.tensor, partial(block, inputs=inputs)
        if tensor is None:
            return recomputed(norm, of_inputs, x).add_(x)
        before = norm if block.enters else lambda x: tensor.enter(norm(x))
        return tensor.leave(recomputed(before, of_inputs, x)).add_(x)


class Decoder(nn.Module):
    def __init__(self, build: Build, chunk: Chunk, recompute_layers: int) -> None:
        super().__init__()
        # Slots without a layer keep their number: it is part of the names.
        self.layers = nn.ModuleDict(
            {
                str(slot.local): TransformerLayer(build, slot.layer, recompute=number < recompute_layers)
                for number, slot in enumerate(chunk.slots)
            }
        )
        self.final_layernorm = build.norm(build.config.hidden_size) if chunk.last else None

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x, inputs)
        return x


class Embedding(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.word_embeddings = WordEmbeddings(build)


class GPTModel(nn.Module):
    """A chunk of a decoder, without its loss. Its parameters have the local names of `tandem.parallel.layout`.

    Args:
        recompute_layers: how many of the chunk's layers are recomputed, from the first.
    """

    def __init__(self, build: Build, chunk: Chunk, recompute_layers: int) -> None:
        super().__init__()
        config = build.config
        self.tensor = build.tensor
        self.embedding = Embedding(build) if chunk.first else None
        self.decoder = Decoder(build, chunk, recompute_layers)
        shared = config.tied and chunk.first
        self.output_layer = build.linear(config.hidden_size, config.vocab_size) if chunk.last and not shared else None
        if build.shard is not None:
            build.shard(self)

    @property
    def head(self) -> Weight:
        """The last chunk's output head [vocabulary, h]: the embedding, when they are tied and it is here."""
        if self.output_layer is not None:
            return self.output_layer.weight
        assert self.embedding is not None
        return self.embedding.word_embeddings.weight

    def forward(self, inputs: Inputs, x: torch.Tensor | None, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The chunk's output, [t, h], from x, the output of the chunk before it (None for the first chunk).

        The last chunk returns normalised hidden states for the head, at `rows` (None: all), [len(rows), h].
        """
        if self.embedding is not None:
            x = self.embedding.word_embeddings(inputs.tokens)
            if torch.is_grad_enabled():
                x.requires_grad_()  # also when the embedding is not trained, but layers are
        assert x is not None
        x = self.decoder(x, inputs)
        norm = self.decoder.final_layernorm
        if norm is None:
            return x
        if self.tensor is None:
            return norm(x if rows is None else x.index_select(0, rows))
        x = self.tensor.enter(norm(x))
        if rows is None:
            rows = torch.arange(inputs.real, device=x.device)  # not a slice: `fully_shard` warns about views
        return x.index_select(0, rows)
