"""Hyper-parameters from and to Hugging Face's `config.json`, of transformers 4 and 5."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.files.text import read_json
from tandem.models.config import ModelConfig, RotaryScaling
from tandem.models.experts import Experts
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

# The same for mixtures of experts: the field, Hugging Face's keys (the first is written), and the default of
# transformers where that is no choice of the model.
EXPERTS_KEYS: dict[str, tuple[tuple[str, ...], Any]] = {
    "num_experts": (("num_experts", "num_local_experts"), None),
    "moe_router_topk": (("num_experts_per_tok",), None),
    "moe_ffn_hidden_size": (("moe_intermediate_size",), None),
    "norm_topk_prob": (("norm_topk_prob",), None),
    "decoder_sparse_step": (("decoder_sparse_step",), 1),
    "mlp_only_layers": (("mlp_only_layers",), []),
    "router_aux_loss_coef": (("router_aux_loss_coef",), 0.001),
}

DEFAULT_ROPE_THETA = 10000.0  # of transformers, where a config says nothing
# Kinds of rotary scaling, with the fields of RotaryScaling that count.
SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
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
    _check_dtypes(hf, where)
    windowed = [kind for kind in hf.get("layer_types") or () if kind != "full_attention"]
    if windowed:
        raise UserError(f"{where}: layer_types contains {windowed[0]!r}; only 'full_attention' is supported")
    values = {field: _value(hf, key, where) for field, key in HF_KEYS.items()}
    theta, scaling = _rotary_from_hf(hf, where)
    if scaling is not None:
        values["max_position_embeddings"] = scaling.longest(values["max_position_embeddings"])
    untied = not hf.get("tie_word_embeddings", False)
    try:
        return ModelConfig(
            model_type=model_type,
            **values,
            rotary_base=theta,
            rotary_scaling=scaling,
            untie_embeddings_and_output_weights=untied,
            experts=_experts_from_hf(hf, where) if FAMILIES[model_type].has_experts else None,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_hf(config: ModelConfig, base: dict[str, Any] | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """Write a Hugging Face config.

    `base` is the config that the model came from. Its other keys are kept. What transformers 4 and 5 spell differently
    is written in both spellings: readers of one do not know the other.
    """
    hf = dict(base or {"attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True})
    if base is None and not config.add_qkv_bias:
        hf["attention_bias"] = False
    hf["architectures"] = [config.family.architecture]
    hf["model_type"] = config.model_type
    for field, key in HF_KEYS.items():
        hf[key] = getattr(config, field)
    if config.experts is not None:
        for field, (keys, _) in EXPERTS_KEYS.items():
            value = getattr(config.experts, field)
            written = [key for key in keys if key == keys[0] or key in hf]
            hf |= dict.fromkeys(written, list(value) if isinstance(value, tuple) else value)
        if base is None:
            hf["output_router_logits"] = False
    hf["tie_word_embeddings"] = config.tied
    hf["torch_dtype"] = hf["dtype"] = dtype
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
    if key == "head_dim" and hf["model_type"] in ("llama", "qwen2", "qwen3_moe"):
        return _value(hf, "hidden_size", where) // _value(hf, "num_attention_heads", where)
    defaults = {"head_dim": 128, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
    if key not in defaults:
        raise UserError(f"{where}: {key!r} is missing")
    return defaults[key]


def _check_dtypes(hf: dict[str, Any], where: str) -> None:
    """Raise UserError when the spellings of transformers 4 and 5 name different dtypes."""
    stated = {key: str(hf[key]).removeprefix("torch.") for key in ("torch_dtype", "dtype") if hf.get(key)}
    if len(set(stated.values())) > 1:
        raise UserError(
            f"{where}: torch_dtype is {stated['torch_dtype']}, dtype is {stated['dtype']}: transformers 4 and 5 would "
            f"compute in different precision; make them equal"
        )


def _experts_from_hf(hf: dict[str, Any], where: str) -> Experts:
    """The experts. transformers 5 saves `num_local_experts`, 4 saves `num_experts`.

    `norm_topk_prob` must be there: transformers takes false without it, and all released models say true.
    """
    values: dict[str, Any] = {}
    for field, (keys, default) in EXPERTS_KEYS.items():
        stated = {key: hf[key] for key in keys if hf.get(key) is not None}
        if len({str(value) for value in stated.values()}) > 1:
            texts = " and ".join(f"{key} is {value}" for key, value in stated.items())
            raise UserError(f"{where}: {texts}: transformers 4 and 5 would read different models; make them equal")
        if not stated and default is None:
            raise UserError(f"{where}: {keys[0]!r} is missing")
        values[field] = next(iter(stated.values()), default)
    return Experts.from_dict(values)


def _rotary_from_hf(hf: dict[str, Any], where: str) -> tuple[float, RotaryScaling | None]:
    """Base and scaling, in the spelling of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

    A config may have both, for readers of either. Then they must agree: each reader would take another one.
    """
    spellings = {name: hf[name] for name in ("rope_parameters", "rope_scaling") if hf.get(name)}
    if any(rope.get("partial_rotary_factor", 1.0) != 1.0 for rope in (hf, *spellings.values())):
        raise UserError(f"{where}: partial_rotary_factor is not supported: rotary embeddings cover the whole head")
    thetas = {float(rope["rope_theta"]) for rope in (hf, *spellings.values()) if rope.get("rope_theta") is not None}
    scalings = [_scaling(rope, hf, where) for rope in spellings.values()]
    if len(thetas) > 1:
        raise UserError(
            f"{where}: rope_theta is both {min(thetas)} and {max(thetas)}, in different places (rope_theta, "
            f"{', '.join(spellings)}): transformers 4 and 5 would compute different models; make them equal"
        )
    if len(set(scalings)) > 1:
        raise UserError(
            f"{where}: rope_parameters ask for {_in_words(scalings[0])}, rope_scaling for {_in_words(scalings[1])}: "
            f"transformers 4 and 5 would compute different models; make them equal"
        )
    return thetas.pop() if thetas else DEFAULT_ROPE_THETA, scalings[0] if scalings else None


def _scaling(rope: dict[str, Any], hf: dict[str, Any], where: str) -> RotaryScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in SCALING_FIELDS:
        supported = ", ".join(["default", *SCALING_FIELDS])
        raise UserError(f"{where}: rope_type {kind!r} is not supported; supported: {supported}")
    # transformers takes null for "not given", and 0 too, where that is no number to scale by
    values = {name: rope[name] for name in SCALING_FIELDS[kind] if rope.get(name) or rope.get(name) is False}
    if kind == "yarn":
        values = _with_defaults_of_yarn(values, hf, where)
    elif "factor" not in values:
        raise UserError(f"{where}: rotary scaling of rope_type {kind!r} has no factor")
    try:
        return RotaryScaling(kind=kind, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _with_defaults_of_yarn(values: dict[str, Any], hf: dict[str, Any], where: str) -> dict[str, Any]:
    """What transformers takes where a config is silent."""
    stated = _value(hf, "max_position_embeddings", where)
    inside, outside = values.get("original_max_position_embeddings"), hf.get("original_max_position_embeddings")
    if inside and outside and inside != outside:
        raise UserError(
            f"{where}: original_max_position_embeddings is both {outside} and, in the rotary scaling, {inside}: "
            f"transformers 5 would take the first, 4 the second; make them equal"
        )
    original = outside or inside or stated
    if "factor" not in values and original == stated:
        raise UserError(f"{where}: rotary scaling of rope_type 'yarn' has no factor")
    return {"factor": stated / original, **values, "original_max_position_embeddings": original}


def _in_words(scaling: RotaryScaling | None) -> str:
    return "no scaling" if scaling is None else f"{scaling.kind} by {scaling.factor}"


def _rotary_to_hf(config: ModelConfig, hf: dict[str, Any]) -> None:
    """Both spellings. Each of transformers 4, transformers 5 and vLLM reads one, and takes 10000 without it."""
    scaling = config.rotary_scaling
    rope: dict[str, Any] | None = None
    if scaling:
        values = {name: getattr(scaling, name) for name in SCALING_FIELDS[scaling.kind]}
        rope = {"rope_type": scaling.kind, **{name: value for name, value in values.items() if value is not None}}
    hf["rope_theta"] = config.rotary_base
    hf["rope_scaling"] = rope
    hf["rope_parameters"] = {"rope_theta": config.rotary_base, **(rope or {"rope_type": "default"})}
