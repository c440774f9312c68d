"""Hyper-parameters from and to Hugging Face's `config.json`, of transformers 4 and 5."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.files.text import read_json
from tandem.models.config import ModelConfig, RotaryScaling
from tandem.models.families import FAMILIES

# Megatron's field name -> Hugging Face's key, for everything that is a plain rename.
HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
}

# Keys whose other values change the mathematics in a way that is not implemented.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, 0.0, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}


def from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a Hugging Face config, in the layout of transformers 4 or 5.

    Raises:
        UserError: a key is missing, or asks for something that is not implemented; `where` is named.
    """
    try:
        return _from_hf(hf, where)
    except (AttributeError, TypeError, ArithmeticError) as error:  # such as a list where a number belongs
        raise UserError(f"{where}: damaged, or not a model's config: {error}") from error


def _from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    for key, allowed in ONLY_SUPPORTED.items():
        if key == "attention_bias" and FAMILIES[model_type].add_qkv_bias:
            continue  # these families have fixed biases: transformers does not read this key
        if hf.get(key) not in (*allowed, None):
            raise UserError(f"{where}: {key} = {hf[key]!r} is not supported; supported: {allowed[0]!r}")
    windowed = [kind for kind in hf.get("layer_types") or () if kind != "full_attention"]
    if windowed:
        raise UserError(f"{where}: layer_types contains {windowed[0]!r}; only 'full_attention' is supported")
    values = {field: _value(hf, key, where) for field, key in HF_KEYS.items()}
    theta, scaling = _rotary_from_hf(hf, where)
    untied = not hf.get("tie_word_embeddings", False)
    try:
        return ModelConfig(
            model_type=model_type,
            **values,
            rotary_base=theta,
            rotary_scaling=scaling,
            untie_embeddings_and_output_weights=untied,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_hf(config: ModelConfig, base: dict[str, Any] | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """Write a Hugging Face config.

    `base` is the config that the model came from. Its other keys are kept, and so is its layout (of transformers 4 or
    5). Without `base`, the older layout is written, which every version reads.
    """
    hf = dict(base or {"attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True})
    if base is None and not config.add_qkv_bias:
        hf["attention_bias"] = False
    hf["architectures"] = [config.family.architecture]
    hf["model_type"] = config.model_type
    for field, key in HF_KEYS.items():
        hf[key] = getattr(config, field)
    hf["tie_word_embeddings"] = config.tied
    hf["dtype" if "dtype" in hf else "torch_dtype"] = dtype
    if "layer_types" in hf:
        hf["layer_types"] = ["full_attention"] * config.num_layers
    _rotary_to_hf(config, hf)
    return hf


def load_hf_config(folder: str | Path) -> dict[str, Any]:
    """The content of `config.json` in a Hugging Face folder."""
    path = Path(folder) / "config.json"
    if not os.path.lexists(path):
        raise UserError(f"{folder} has no config.json: expected a Hugging Face model folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not a JSON object")
    return config


def hf_dtype(hf: dict[str, Any]) -> str | None:
    """The dtype that a config names, under the key of transformers 5 or 4; None without one.

    >>> hf_dtype({"torch_dtype": "bfloat16"})
    'bfloat16'
    """
    return hf.get("dtype") or hf.get("torch_dtype")


def _value(hf: dict[str, Any], key: str, where: str) -> Any:
    """A config's value. For keys that a config may leave out: Hugging Face's default."""
    if hf.get(key) is not None:
        return hf[key]
    if key == "num_key_value_heads":
        return _value(hf, "num_attention_heads", where)
    if key == "head_dim" and hf["model_type"] in ("llama", "qwen2"):
        return _value(hf, "hidden_size", where) // _value(hf, "num_attention_heads", where)
    defaults = {"head_dim": 128, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
    if key not in defaults:
        raise UserError(f"{where}: {key!r} is missing")
    return defaults[key]


def _rotary_from_hf(hf: dict[str, Any], where: str) -> tuple[float, RotaryScaling | None]:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported: rotary embeddings cover the whole head")
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope_type {kind!r} is not supported; supported: default, linear, llama3")
    fields = [f.name for f in dataclasses.fields(RotaryScaling) if f.name != "kind" and f.name in rope]
    return float(theta), RotaryScaling(kind=kind, **{name: rope[name] for name in fields})


def _rotary_to_hf(config: ModelConfig, hf: dict[str, Any]) -> None:
    scaling = config.rotary_scaling
    rope: dict[str, Any] | None = None
    if scaling:
        keep = ("factor",) if scaling.kind == "linear" else tuple(dataclasses.asdict(scaling))
        rope = {"rope_type": scaling.kind, **{k: v for k, v in dataclasses.asdict(scaling).items() if k in keep}}
        rope.pop("kind", None)
    if "rope_parameters" in hf:
        hf["rope_parameters"] = {"rope_theta": config.rotary_base, **(rope or {"rope_type": "default"})}
    else:
        hf["rope_theta"] = config.rotary_base
        hf["rope_scaling"] = rope
