"""The weight map is a bijection, and groups queries, keys and values as Megatron does."""

from __future__ import annotations

import numpy as np
import pytest

from tandem.checkpoints.random_init import RandomSource
from tandem.models.tensors import tensor_table
from tandem.models.weight_map import WeightMap
from toys import DENSE_TOYS, TOYS, moe_config, toy_config


@pytest.mark.parametrize("name", TOYS)
def test_to_hf_and_back_is_exact(name: str) -> None:
    config = TOYS[name]
    source, weights = RandomSource(config, 1), WeightMap(config)
    shapes = weights.hf_shapes()
    for tensor_name in tensor_table(config):
        tensor = source.read(tensor_name)
        parts = weights.to_hf(tensor_name, tensor)
        assert {part: array.shape for part, array in parts.items()} == {part: shapes[part] for part in parts}
        assert np.array_equal(weights.to_mcore(tensor_name, list(parts.values())), tensor)


@pytest.mark.parametrize("name", DENSE_TOYS)
def test_names_are_those_of_transformers(name: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from tandem.models.hf_config import to_hf

    config = TOYS[name]
    hf = to_hf(config, dtype="float32")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.model_type](**hf))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tied:
        del expected["lm_head.weight"]
    assert WeightMap(config).hf_shapes() == expected


def test_grouped_qkv_order() -> None:
    """Two groups, two query heads each, one channel pair: q0 q1 k0 v0 | q2 q3 k1 v1."""
    config = toy_config(num_attention_heads=4, num_query_groups=2, kv_channels=2, hidden_size=1)
    q, k, v = np.arange(8.0)[:, None], 100 + np.arange(4.0)[:, None], 200 + np.arange(4.0)[:, None]
    fused = WeightMap(config).to_mcore("decoder.layers.0.self_attention.linear_qkv.weight", [q, k, v])
    assert fused[:, 0].tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_experts_are_in_one_tensor_one_below_the_other() -> None:
    """In files every expert has tensors of its own, under the names that transformers saves."""
    config = moe_config(mlp_only_layers=(1, 2))
    weights = WeightMap(config)
    gates, ups = (np.full((8, 24, 48), offset) + np.arange(8)[:, None, None] for offset in (0, 100))
    parts = [part[expert] for expert in range(8) for part in (gates, ups)]
    fused = weights.to_mcore("decoder.layers.0.mlp.experts.linear_fc1.weight", parts)
    assert fused.shape == (8 * 2 * 24, 48)
    assert fused[::24, 0].tolist() == [0, 100, 1, 101, 2, 102, 3, 103, 4, 104, 5, 105, 6, 106, 7, 107]
    names = list(weights.rows["decoder.layers.0.mlp.experts.linear_fc1.weight"])
    assert names[:3] == [f"model.layers.0.mlp.experts.{name}_proj.weight" for name in ("0.gate", "0.up", "1.gate")]
