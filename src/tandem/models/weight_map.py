"""Hugging Face names <-> Megatron-core names, and which rows of the one are which rows of the other.

A row of a table says of one mcore tensor which Hugging Face tensors it is made of, and of which of its rows each of
these is the stack; both directions follow from that. Nothing is computed, only moved. A family is a table of rows;
`WeightMap` unrolls it over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix, tensor_table

Shape = tuple[int, ...]
# Half-open ranges of the first dimension.
Ranges = tuple[tuple[int, int], ...]


class Row(Protocol):
    """One mcore tensor and the Hugging Face tensors it is made of."""

    @property
    def mcore(self) -> str: ...

    @property
    def hf(self) -> tuple[str, ...]: ...

    def ranges(self, rows: int, config: ModelConfig) -> tuple[Ranges, ...]:
        """For each Hugging Face tensor, the ranges of the mcore tensor's `rows` rows that, stacked, are it."""
        ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    mcore: str
    source: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.source,)

    def ranges(self, rows: int, config: ModelConfig) -> tuple[Ranges, ...]:
        return (((0, rows),),)


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

    def ranges(self, rows: int, config: ModelConfig) -> tuple[Ranges, ...]:
        size = rows // config.num_query_groups
        key, value = size - 2 * config.kv_channels, size - config.kv_channels
        groups = range(0, rows, size)
        return tuple(
            tuple((group + start, group + stop) for group in groups)
            for start, stop in ((0, key), (key, value), (value, size))
        )


@dataclass(frozen=True)
class GateUp:
    """gate [f, h], up [f, h] <-> [2f, h]: gate above up."""

    mcore: str
    gate: str
    up: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def ranges(self, rows: int, config: ModelConfig) -> tuple[Ranges, ...]:
        return ((0, rows // 2),), ((rows // 2, rows),)


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


class WeightMap:
    """The whole model's map, in the tensor table's order.

    Attributes:
        rows: mcore name -> Hugging Face name -> the ranges of the mcore tensor's rows that, stacked, are that tensor.
    """

    def __init__(self, config: ModelConfig) -> None:
        layer_rows = {row.mcore: row for row in LAYER_ROWS[config.model_type]}
        outside = {row.mcore: row for row in OUTSIDE_LAYERS}
        self._table = tensor_table(config)
        self.rows: dict[str, dict[str, Ranges]] = {}
        for name, spec in self._table.items():
            if spec.layer is None:
                row, prefix = outside[name], ""
            else:
                row, prefix = layer_rows[name.removeprefix(layer_prefix(spec.layer))], f"model.layers.{spec.layer}."
            hf = (prefix + part for part in row.hf)
            self.rows[name] = dict(zip(hf, row.ranges(spec.shape[0], config), strict=True))

    def hf_shapes(self) -> dict[str, Shape]:
        """Every Hugging Face tensor that the config implies, with its shape; no `lm_head` when tied."""
        return {
            hf: (sum(stop - start for start, stop in ranges), *self._table[name].shape[1:])
            for name, found in self.rows.items()
            for hf, ranges in found.items()
        }

    def to_hf(self, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """The Hugging Face tensors that an mcore tensor is made of; views where rows lie together."""
        return {hf: _stack([tensor[start:stop] for start, stop in ranges]) for hf, ranges in self.rows[name].items()}

    def to_mcore(self, name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse; `parts` in the order of `rows[name]`."""
        pieces: dict[int, np.ndarray] = {}
        for part, ranges in zip(parts, self.rows[name].values(), strict=True):
            ends = np.cumsum([stop - start for start, stop in ranges])[:-1]
            pieces.update(zip((start for start, _ in ranges), np.split(part, ends)))
        return _stack([pieces[start] for start in sorted(pieces)])


def _stack(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
