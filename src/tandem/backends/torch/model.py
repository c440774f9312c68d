"""The decoder of every family, for one process, under Megatron-core's names.

Shapes: t tokens of documents laid end to end, h hidden size. Head counts are read off the weights, so that a module
whose weights are a slice computes that slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tandem.backends.torch.attention import Run, attention, runs
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
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.models.rotary import cos_sin


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device.

    Attributes:
        tokens: [t].
        cos, sin: of each token's rotary angles, [t, 1, kv_channels / 2].
        packed: the documents, equal lengths joined.
    """

    tokens: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    packed: list[Run]


def prepare(config: ModelConfig, batch: MicroBatch, dtype: torch.dtype, device: torch.device) -> Inputs:
    half = config.kv_channels // 2
    cos, sin = (
        torch.from_numpy(np.ascontiguousarray(angles[:, None, :half])).to(device, dtype)
        for angles in cos_sin(config, batch.position_ids)
    )
    return Inputs(torch.from_numpy(batch.tokens).to(device), cos, sin, runs(batch.lengths.tolist()))


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, bias: bool = False) -> None:
        super().__init__()
        self.weight = new_weight(outputs, inputs, dtype=dtype, device=device)
        self.bias = new_weight(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = new_weight(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class WordEmbeddings(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = new_weight(config.vocab_size, config.hidden_size, dtype=dtype, device=device)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return embedding(tokens, self.weight)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        head, heads, groups = config.kv_channels, config.num_attention_heads, config.num_query_groups
        self.group_shape = (-1, heads // groups + 2, head)
        self.eps = config.norm_epsilon
        qkv = (heads + 2 * groups) * head
        self.linear_qkv = Linear(config.hidden_size, qkv, dtype, device, bias=config.add_qkv_bias)
        self.linear_proj = Linear(heads * head, config.hidden_size, dtype, device)
        self.q_layernorm, self.k_layernorm = (
            RMSNorm(head, self.eps, dtype, device) if config.qk_layernorm else None for _ in range(2)
        )

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        qkv = self.linear_qkv(x).unflatten(1, self.group_shape)  # [t, groups, queries per group + 2, d]
        q_weight, k_weight = (
            norm.weight if norm is not None else None for norm in (self.q_layernorm, self.k_layernorm)
        )

        def heads(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return rotary_heads(qkv, q_weight, k_weight, self.eps, inputs.cos, inputs.sin)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), inputs.packed)

        return self.linear_proj(recomputed(heads, attend, qkv))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, 2 * config.ffn_hidden_size, dtype, device)
        self.linear_fc2 = Linear(config.ffn_hidden_size, config.hidden_size, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return recomputed(swiglu, self.linear_fc2, self.linear_fc1(x))


class TransformerLayer(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon, dtype, device)
        self.self_attention = SelfAttention(config, dtype, device)
        self.pre_mlp_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        x = recomputed(self.input_layernorm, partial(self.self_attention, inputs=inputs), x).add_(x)
        return recomputed(self.pre_mlp_layernorm, self.mlp, x).add_(x)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, recompute_layers: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.recompute_layers = recompute_layers
        self.layers = nn.ModuleList(TransformerLayer(config, dtype, device) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon, dtype, device)

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if number < self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, inputs, use_reentrant=True, preserve_rng_state=False)
            else:
                x = layer(x, inputs)
        return x


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.word_embeddings = WordEmbeddings(config, dtype, device)


class GPTModel(nn.Module):
    """A decoder without its loss. Its parameters bear the names of `tandem.models.tensors`."""

    def __init__(self, config: ModelConfig, recompute_layers: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.embedding = Embedding(config, dtype, device)
        self.decoder = Decoder(config, recompute_layers, dtype, device)
        self.output_layer = None if config.tied else Linear(config.hidden_size, config.vocab_size, dtype, device)

    @property
    def head(self) -> Weight:
        """The output head's weight [vocabulary, h]: the embedding's when they are tied."""
        return (self.output_layer or self.embedding.word_embeddings).weight

    def forward(self, inputs: Inputs, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised hidden states, ready for the head, of `rows` (all when None): [len(rows), h]."""
        x = self.decoder(self.embedding.word_embeddings(inputs.tokens), inputs)
        return self.decoder.final_layernorm(x if rows is None else x.index_select(0, rows))

    def weights(self) -> Iterator[tuple[str, Weight]]:
        for name, parameter in self.named_parameters():
            assert isinstance(parameter, Weight)
            yield name, parameter
