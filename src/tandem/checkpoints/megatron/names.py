"""Names in Megatron's `torch` checkpoints: folders, files and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tandem.checkpoints.formats.torch_reader import LazyTensor
from tandem.checkpoints.megatron.experts import Stack
from tandem.checkpoints.megatron.grouped_adapters import part_of_own_factor
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, OUTPUT, tensor_table
from tandem.parallel.layout import Layout, Shard, rank_files, shards

FILE = "model_optim_rng.pt"
DISTRIBUTED_OPTIMIZER = "distrib_optim.pt"  # next to it, with --use-distributed-optimizer
CHECKPOINT_VERSION = 3.0  # older versions order the rows of linear_qkv differently
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

# Names under which Transformer Engine's fused layers hold a norm.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

# MindSpeed-LLM's names in a layer with adapters.
BASE_LAYER = ".base_layer.weight"
ADAPTER = ".lora_"
LORA_A = ".lora_A.default.weight"

EXTRA_STATE = "._extra_state"  # Transformer Engine's fp8 scales; empty otherwise
VOCABULARY = (EMBEDDING, OUTPUT)  # the tensors that have a row for every token
Chunk = dict[str, LazyTensor | Stack]


def model_key(chunk: int, chunks: int) -> str:
    return "model" if chunks == 1 else f"model{chunk}"


def shards_of(config: ModelConfig, layout: Layout, *, own_factors: bool = False) -> dict[str, list[Shard]]:
    """Global name -> its shards in all files, including the copies of a tied head.

    `tensor_rank` and `expert_rank` are the numbers in the name of the file's folder. With `own_factors`, the ranks that
    cut an expert have adapters of their own: see `part_of_own_factor`.
    """
    by_name: dict[str, list[Shard]] = {name: [] for name in tensor_table(config)}
    files = rank_files(layout)
    for shard in shards(config, layout, tied_head_copy=True):
        is_own = own_factors and shard.spec.adapter is not None and shard.spec.split.experts > 0
        part = part_of_own_factor(shard, layout.expert_tensor_size) if is_own else shard.part
        by_name[shard.spec.name] += [
            replace(shard, tensor_rank=file.tensor, expert_rank=file.expert, part=part)
            for file in files
            if file.holds(shard)
        ]
    return by_name


def renamed(name: str, names: Mapping[str, str]) -> str:
    """`name` with the part after its layer number replaced, if that is one of `names`.

    >>> renamed("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", FUSED_NORMS)
    'decoder.layers.3.pre_mlp_layernorm.weight'
    """
    layer = LAYER.match(name)
    prefix = layer[0] if layer else ""
    rest = name.removeprefix(prefix)
    return prefix + names.get(rest, rest)
