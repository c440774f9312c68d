"""Hugging Face config.json <-> ModelConfig."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.models import published as qwen3
from tandem.models.config import ModelConfig, RotaryScaling
from tandem.models.hf_config import from_hf, to_hf
from tandem.models.published import QWEN3_SIZES
from tandem.models.tensors import parameter_count
from toys import TOYS, qwen3_config, toy_config

OLD = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "model_type": "qwen3",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
}
NEW = {k: v for k, v in OLD.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")} | {
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "layer_types": ["full_attention"] * 4,
}


def test_old_and_new_transformers_layouts_mean_the_same() -> None:
    assert from_hf(OLD) == from_hf(NEW)
    assert from_hf(OLD).rotary_base == 1e6  # Not the default of 10000


@pytest.mark.parametrize("original", [OLD, NEW], ids=["old", "new"])
def test_a_config_is_written_in_both_spellings(original: dict) -> None:
    """What only one of transformers 4 and 5 reads is there for the other, too. The rest stays as it was."""
    both = {key: NEW[key] for key in ("dtype", "rope_parameters")} | {
        key: OLD[key] for key in ("torch_dtype", "rope_theta", "rope_scaling")
    }
    written = to_hf(from_hf(original), base=original)
    assert written == original | both
    assert to_hf(from_hf(written), base=written) == written


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": 10000.0}, r"rope_theta is both 10000\.0 and 1000000\.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "no scaling, rope_scaling for linear by 2"),
        ({"torch_dtype": "float32"}, "torch_dtype is float32, dtype is bfloat16: .*; make them equal"),
        (
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 128,
            },
            "original_max_position_embeddings is both 128 and, in the rotary scaling, 64",
        ),
        ({"rope_scaling": {**SCALED, "rope_theta": 5e5}}, r"rope_theta is both 500000\.0 and 1000000\.0"),
    ],
)
def test_spellings_that_contradict_each_other_are_refused(change: dict, named: str) -> None:
    """Each reader would take another one."""
    with pytest.raises(UserError, match=named):
        from_hf(NEW | change)


def test_a_scaling_in_both_spellings_is_one_scaling() -> None:
    scaled = OLD | {"rope_scaling": SCALED, "rope_parameters": {**SCALED, "rope_theta": 1e6}}
    assert from_hf(scaled).rotary_scaling == RotaryScaling("llama3", 8.0, 1.0, 4.0)


@pytest.mark.parametrize("name", TOYS)
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = TOYS[name]
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert from_hf(read.to_dict()) == config


def test_llama_scaling_survives() -> None:
    scaling = RotaryScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = toy_config(model_type="llama", rotary_scaling=scaling)
    assert from_hf(to_hf(config)) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"hidden_size": None}, "hidden_size"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        from_hf(OLD | change)


# parameters by the hand count of `count_by_hand`
PARAMETERS = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}


def count_by_hand(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> int:
    attention = 2 * hidden * heads * 128 + 2 * hidden * 8 * 128 + 2 * 128
    layer = attention + 3 * hidden * ffn + 2 * hidden
    return layers * layer + hidden + 151936 * hidden * (1 if tied else 2)


@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_parameter_count(size: str) -> None:
    from tandem.models.tensors import parameter_count

    assert parameter_count(qwen3_config(size)) == count_by_hand(*QWEN3_SIZES[size]) == PARAMETERS[size]


def test_qwen2_has_biases_and_no_head_dim_of_its_own() -> None:
    """Qwen2.5-7B's config.json, as published."""
    published = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    config = from_hf(published)
    assert (config.kv_channels, config.add_qkv_bias, config.qk_layernorm) == (128, True, False)
    assert from_hf(to_hf(config, base=published)) == from_hf(to_hf(config)) == config


MIXTURE = OLD | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "router_aux_loss_coef": 0.01,
}


def test_experts_of_both_transformers_generations() -> None:
    """transformers 5 saves num_local_experts; num_experts, which 4 reads, is written next to it."""
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in MIXTURE.items()}
    config = from_hf(renamed)
    assert config == from_hf(MIXTURE)
    assert [config.experts_in(layer) is not None for layer in range(4)] == [False, True, False, False]
    assert {key: to_hf(config, base=MIXTURE)[key] for key in MIXTURE} == MIXTURE
    assert to_hf(config, base=renamed)["num_experts"] == to_hf(config, base=renamed)["num_local_experts"] == 8
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm_topk_prob": None}, "'norm_topk_prob' is missing"),
        ({"num_experts": None}, "'num_experts' is missing"),
        ({"num_local_experts": 16}, "num_experts is 8 and num_local_experts is 16"),
        ({"num_experts_per_tok": 9}, r"\(num_experts_per_tok\) 9: expected at most the 8 experts"),
        ({"moe_intermediate_size": 0}, "moe_ffn_hidden_size 0"),
    ],
)
def test_wrong_experts_are_named(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        from_hf(MIXTURE | change)


def test_published_mixtures_have_their_number_of_parameters() -> None:
    sizes = {size: parameter_count(qwen3.qwen3_config(size)) for size in qwen3.QWEN3_MOE_SIZES}
    assert sizes == {"30B-A3B": 30532122624, "235B-A22B": 235093634560, "Coder-480B-A35B": 480154875392}
