"""The `args` inside a Megatron checkpoint <-> ModelConfig and Layout.

Trainers store their whole command line there; MindSpeed-LLM's converter stores Hugging Face's config. The names of
both are read, and the names that either reads are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from tandem.checkpoints.interface import Companions
from tandem.checkpoints.megatron.rotary_args import scaling_from_args, scaling_to_args
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts, sparse_layers
from tandem.models.families import FAMILIES
from tandem.models.hf_config import from_hf
from tandem.parallel.layout import Layout

Args = Mapping[str, Any]

# Settings whose other values change the mathematics without changing the tensors.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope", "yarn"),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),  # the same under its newer name
    "apply_residual_connection_post_layernorm": (False,),
    "rope_scaling_type": ("yarn",),
}
# Settings whose other values change which layers a file holds.
ONLY_ORDER: dict[str, tuple[Any, ...]] = {"schedules_method": ()}

# Fields that must agree wherever a checkpoint states them twice. `max_position_embeddings` is left out: trainers set
# it to the length that they train on.
AGREEING = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("rotary_base", "untie_embeddings_and_output_weights"),
)

# Megatron-LM's name up to 0.15, its name from 0.16 on, and Hugging Face's.
NORM_EPSILON = ("norm_epsilon", "layernorm_epsilon", "rms_norm_eps")


def to_args(
    config: ModelConfig, layout: Layout, dtype: str, padded_vocab_size: int, *, grouped: bool = False
) -> argparse.Namespace:
    """The `args` that Megatron-LM and MindSpeed-LLM read when they load or convert. Plain values only.

    `grouped`: experts are stored as for `--moe-grouped-gemm`.
    """
    values: dict[str, Any] = {
        "model_type_hf": config.model_type,
        "num_layers": config.num_layers + len(layout.noop_layers),
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_query_groups,
        "num_key_value_heads": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "qk_layernorm": config.qk_layernorm,
        "max_position_embeddings": config.max_position_embeddings,
        "add_position_embedding": True,
        "rotary_base": int(config.rotary_base) if config.rotary_base.is_integer() else config.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        **scaling_to_args(config.rotary_scaling),
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_epsilon,
        "apply_layernorm_1p": False,
        "attention_dropout": 0.0,  # Megatron's own default is 0.1
        "hidden_dropout": 0.0,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "untie_embeddings_and_output_weights": config.untie_embeddings_and_output_weights,
        "tie_word_embeddings": config.tied,
        "init_method_std": config.init_method_std,
        "vocab_size": config.vocab_size,
        "true_vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "params_dtype": f"torch.{dtype}",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        **_layout_values(config, layout),
        **(_experts_to_args(config, config.experts, layout, grouped) if config.experts else {}),
    }
    return argparse.Namespace(**values)


def config_from_args(args: Args, where: str, noop_layers: tuple[int, ...]) -> ModelConfig:
    """The model that `args` describe. `noop_layers` do not count as layers.

    The vocabulary is `true_vocab_size` where a converter recorded it, otherwise the padded one. A trainer's
    `vocab_size` is that of its tokenizer.

    Raises:
        UserError: a value is missing or not supported. `where` is named.
    """
    _check_supported(args, where, ONLY_SUPPORTED)
    scaling, stated = scaling_from_args(args, where), _value(args, where, "max_position_embeddings")
    return ModelConfig(
        model_type=_model_type(args, where),
        num_layers=_value(args, where, "num_layers") - len(noop_layers),
        hidden_size=_value(args, where, "hidden_size"),
        ffn_hidden_size=_value(args, where, "ffn_hidden_size", "intermediate_size"),
        num_attention_heads=_value(args, where, "num_attention_heads"),
        num_query_groups=_query_groups(args, where),
        kv_channels=_value(args, where, "kv_channels", "head_dim"),
        vocab_size=_value(args, where, "true_vocab_size", "padded_vocab_size", "vocab_size"),
        max_position_embeddings=scaling.longest(stated) if scaling else stated,
        norm_epsilon=_value(args, where, *NORM_EPSILON),
        rotary_base=float(_value(args, where, "rotary_base", "rope_theta")),
        rotary_scaling=scaling,
        untie_embeddings_and_output_weights=_value(args, where, "untie_embeddings_and_output_weights"),
        init_method_std=_value(args, where, "init_method_std", "initializer_range"),
        experts=_experts_from_args(args, where, noop_layers),
    )


def described_model(
    args: Args, where: str, config: ModelConfig | None, companions: Companions, noop_layers: tuple[int, ...]
) -> ModelConfig:
    """The model of a checkpoint: `config` if given, else the companions' config.json, else what `args` describe.

    Raises:
        UserError: nothing describes the model, or `args` contradict the config. `where` is named.
    """
    _check_supported(args, where, ONLY_ORDER)
    if config is None and companions.hf_config is not None:
        config = from_hf(companions.hf_config, where=f"config.json next to {where}")
    if config is not None:
        check_agreement(args, where, config, noop_layers)
        check_experts(args, where, config, noop_layers)
        return config
    if not args:
        raise UserError(f"{where} holds no args: the model is unknown. Give its config.json with --hf-cfg-dir")
    return config_from_args(args, where, noop_layers)


def check_agreement(args: Args, where: str, config: ModelConfig, noop_layers: tuple[int, ...]) -> None:
    """Raise UserError when `args` contradict a config from another place."""
    stated = {field: args[field] for field in AGREEING if args.get(field) is not None}
    if "num_layers" in stated:
        stated["num_layers"] -= len(noop_layers)
    if any(args.get(name) is not None for name in NORM_EPSILON):
        stated["norm_epsilon"] = _value(args, where, *NORM_EPSILON)
    if _states_query_groups(args):
        stated["num_query_groups"] = _query_groups(args, where)
    for field, value in stated.items():
        if value != getattr(config, field):
            hint = "; give slots without a layer with `tandem convert --source-noop-layers`"
            hint = hint if field == "num_layers" else ""
            raise UserError(
                f"{where}: args say {field} = {value!r}, the model's config says {getattr(config, field)!r}{hint}"
            )


def check_experts(args: Args, where: str, config: ModelConfig, noop_layers: tuple[int, ...]) -> None:
    """Raise UserError when `args` have other experts than the config of the model."""
    there = number_of_experts(args) or None
    here = config.experts.num_experts if config.experts else None
    if there is not None and there != here:
        raise UserError(f"{where}: args say num_experts = {there!r}, the model's config says {here!r}")
    if config.experts is None or not there:
        return
    actual = _experts_from_args(args, where, noop_layers)
    assert actual is not None
    for field in ("moe_router_topk", "moe_ffn_hidden_size", "norm_topk_prob"):
        stated, own = getattr(actual, field), getattr(config.experts, field)
        if stated != own:
            raise UserError(f"{where}: args say {field} = {stated!r}, the model's config says {own!r}")


def _check_supported(args: Args, where: str, supported: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in supported.items():
        if args.get(key) not in (*allowed, None):
            expected = f"supported: {allowed[0]!r}" if allowed else "it must not be set"
            raise UserError(f"{where}: args say {key} = {args[key]!r}; {expected}")


def numbers(value: Any) -> tuple[int, ...]:
    """Layer numbers as trainers store them: "0,7", a list, a set, or None.

    >>> numbers("0,7")
    (0, 7)
    """
    if value is None:
        return ()
    items = value.split(",") if isinstance(value, str) else sorted(value) if isinstance(value, frozenset) else value
    return tuple(int(item) for item in items)


def _layout_values(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    per_chunk = layout.num_layers_per_virtual_pipeline_stage
    chunks = len(layout.stages(config.num_layers)[0])
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "num_layers_per_virtual_pipeline_stage": per_chunk,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_size,
        "moe_tp_extend_ep": layout.moe_tp_extend_ep,
        "context_parallel_size": 1,
        "num_layer_list": ",".join(map(str, layout.num_layer_list)) if layout.num_layer_list else None,
        "noop_layers": ",".join(map(str, layout.noop_layers)) if layout.noop_layers else None,
    }


def _value(args: Args, where: str, *names: str) -> Any:
    """The first of `names` that is set."""
    for name in names:
        value = args.get(name)
        if isinstance(value, bool | int | float):
            return value
    raise UserError(
        f"{where}: args do not say {names[0]}: give the folder of the model's config.json with --hf-cfg-dir"
    )


def _model_type(args: Args, where: str) -> str:
    if args.get("model_type_hf") in FAMILIES:
        return args["model_type_hf"]
    features = bool(args.get("qk_layernorm")), bool(args.get("add_qkv_bias")), bool(number_of_experts(args))
    for name, family in FAMILIES.items():
        if (family.qk_layernorm, family.add_qkv_bias, family.has_experts) == features:
            return name
    raise UserError(f"{where}: args say qk_layernorm and add_qkv_bias; no supported family has both")


def number_of_experts(args: Args) -> int | None:
    """Megatron-LM calls it num_experts, Megatron-core num_moe_experts."""
    return args.get("num_experts") or args.get("num_moe_experts")


def _experts_to_args(config: ModelConfig, experts: Experts, layout: Layout, grouped: bool) -> dict[str, Any]:
    sparse = [int(experts.are_in(layer)) for layer in range(config.num_layers)]
    everywhere = all(sparse)
    for slot in sorted(layout.noop_layers):  # Megatron counts these
        sparse.insert(slot, 0)
    return {
        "num_experts": experts.num_experts,
        "moe_router_topk": experts.moe_router_topk,
        "moe_ffn_hidden_size": experts.moe_ffn_hidden_size,
        "moe_layer_freq": 1 if everywhere else sparse,
        "norm_topk_prob": experts.norm_topk_prob,
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": experts.router_aux_loss_coef,
        "moe_grouped_gemm": grouped,
    }


def _experts_from_args(args: Args, where: str, noop_layers: tuple[int, ...]) -> Experts | None:
    """The experts, and which layers have them: every layer, every n-th from the first, or those that a list marks."""
    count = number_of_experts(args)
    if not count:
        return None
    every, dense = args.get("moe_layer_freq") or 1, args.get("first_k_dense_replace") or 0
    num_slots = _value(args, where, "num_layers")
    sparse = sparse_layers(every, dense, num_slots, noop_layers)
    if sparse is None:
        raise UserError(f"{where}: args say moe_layer_freq = {every}; expected a number for each of {num_slots} layers")
    normalised = bool(args.get("norm_topk_prob")) or not args.get("moe_router_pre_softmax")
    return Experts(
        num_experts=count,
        moe_router_topk=_value(args, where, "moe_router_topk", "num_experts_per_tok"),
        moe_ffn_hidden_size=_value(
            args, where, "moe_ffn_hidden_size", "moe_intermediate_size", "ffn_hidden_size", "intermediate_size"
        ),
        norm_topk_prob=normalised,
        mlp_only_layers=tuple(layer for layer, has_experts in enumerate(sparse) if not has_experts),
        router_aux_loss_coef=float(args.get("moe_aux_loss_coeff") or 0.0),
    )


def _states_query_groups(args: Args) -> bool:
    return args.get("num_query_groups") is not None or args.get("num_key_value_heads") is not None


def _query_groups(args: Args, where: str) -> int:
    """The number of key/value heads.

    Megatron leaves `num_query_groups` at 1 when every query head has its own. MindSpeed-LLM's converter stores only
    `num_key_value_heads`, and wrongly sets `group_query_attention` to False.
    """
    if args.get("num_query_groups") is None:
        return _value(args, where, "num_key_value_heads", "num_attention_heads")
    if args.get("group_query_attention", True):
        return args["num_query_groups"]
    return _value(args, where, "num_attention_heads")
