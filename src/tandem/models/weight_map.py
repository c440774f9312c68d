"""Hugging Face names <-> Megatron-core names, and the reshaping between them.

A row owns both directions of one mcore tensor. A family is a table of rows; `WeightMap` unrolls it over layers.
Arrays keep their dtype; nothing is computed, only moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix, tensor_table

Shape = tuple[int, ...]


class Row(Protocol):
    """One mcore tensor and the Hugging Face tensors it is made of."""

    @property
    def mcore(self) -> str: ...

    @property
    def hf(self) -> tuple[str, ...]: ...

    def hf_shapes(self, shape: Shape, config: ModelConfig) -> tuple[Shape, ...]: ...

    def to_mcore(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray: ...

    def to_hf(self, tensor: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, ...]: ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    mcore: str
    source: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.source,)

    def hf_shapes(self, shape: Shape, config: ModelConfig) -> tuple[Shape, ...]:
        return (shape,)

    def to_mcore(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        return parts[0]

    def to_hf(self, tensor: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, ...]:
        return (tensor,)


@dataclass(frozen=True)
class GroupedQKV:
    """q [A*D, h], k [G*D, h], v [G*D, h] <-> [(A+2G)*D, h], group after group: its A/G queries, its key, its value."""

    mcore: str
    q: str
    k: str
    v: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    def hf_shapes(self, shape: Shape, config: ModelConfig) -> tuple[Shape, ...]:
        head, rest = config.kv_channels, shape[1:]
        query = (config.num_attention_heads * head, *rest)
        key = (config.num_query_groups * head, *rest)
        return query, key, key

    def to_mcore(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        groups, rest = config.num_query_groups, parts[0].shape[1:]
        grouped = [part.reshape(groups, part.shape[0] // groups, *rest) for part in parts]
        return np.concatenate(grouped, axis=1).reshape(-1, *rest)

    def to_hf(self, tensor: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, ...]:
        groups, head, rest = config.num_query_groups, config.kv_channels, tensor.shape[1:]
        grouped = tensor.reshape(groups, -1, *rest)
        q, k, v = grouped[:, : -2 * head], grouped[:, -2 * head : -head], grouped[:, -head:]
        return tuple(np.ascontiguousarray(part).reshape(-1, *rest) for part in (q, k, v))


@dataclass(frozen=True)
class GateUp:
    """gate [f, h], up [f, h] <-> [2f, h]: gate above up."""

    mcore: str
    gate: str
    up: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def hf_shapes(self, shape: Shape, config: ModelConfig) -> tuple[Shape, ...]:
        half = (shape[0] // 2, *shape[1:])
        return half, half

    def to_mcore(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        return np.concatenate(parts, axis=0)

    def to_hf(self, tensor: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, ...]:
        return tuple(np.split(tensor, 2, axis=0))


LLAMA_LAYER: tuple[Row, ...] = (
    Rename("input_layernorm.weight", "input_layernorm.weight"),
    GroupedQKV(
        "self_attention.linear_qkv.weight",
        q="self_attn.q_proj.weight",
        k="self_attn.k_proj.weight",
        v="self_attn.v_proj.weight",
    ),
    Rename("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    Rename("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    GateUp("mlp.linear_fc1.weight", gate="mlp.gate_proj.weight", up="mlp.up_proj.weight"),
    Rename("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)

QWEN3_LAYER: tuple[Row, ...] = (
    *LLAMA_LAYER,
    Rename("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    Rename("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

QWEN2_LAYER: tuple[Row, ...] = (
    *LLAMA_LAYER,
    GroupedQKV(
        "self_attention.linear_qkv.bias",
        q="self_attn.q_proj.bias",
        k="self_attn.k_proj.bias",
        v="self_attn.v_proj.bias",
    ),
)

OUTSIDE_LAYERS: tuple[Row, ...] = (
    Rename(EMBEDDING, "model.embed_tokens.weight"),
    Rename(FINAL_NORM, "model.norm.weight"),
    Rename(OUTPUT, "lm_head.weight"),
)

LAYER_ROWS: dict[str, tuple[Row, ...]] = {"qwen3": QWEN3_LAYER, "qwen2": QWEN2_LAYER, "llama": LLAMA_LAYER}

LM_HEAD = "lm_head.weight"
HF_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Entry:
    """One global mcore tensor, its Hugging Face tensors with their shapes, and the row that converts."""

    row: Row
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]


class WeightMap:
    """The whole model's map, in the tensor table's order."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        layer_rows = {row.mcore: row for row in LAYER_ROWS[config.model_type]}
        outside = {row.mcore: row for row in OUTSIDE_LAYERS}
        self.entries: dict[str, Entry] = {}
        for name, spec in tensor_table(config).items():
            if spec.layer is None:
                row, hf = outside[name], outside[name].hf
            else:
                row = layer_rows[name.removeprefix(layer_prefix(spec.layer))]
                hf = tuple(f"model.layers.{spec.layer}.{part}" for part in row.hf)
            self.entries[name] = Entry(row, hf, row.hf_shapes(spec.shape, config))

    def hf_shapes(self) -> dict[str, Shape]:
        """Every Hugging Face tensor that the config implies, with its shape; no `lm_head` when tied."""
        return {
            name: shape
            for entry in self.entries.values()
            for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
        }

    def to_mcore(self, name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
        return self.entries[name].row.to_mcore(parts, self.config)

    def to_hf(self, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        entry = self.entries[name]
        return dict(zip(entry.hf, entry.row.to_hf(tensor, self.config), strict=True))
