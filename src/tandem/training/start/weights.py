"""Opens the initial weights of a run, and checks that their model is the one that the flags describe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator

from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.megatron.rotary_args import scaling_from_args
from tandem.checkpoints.name_lists import numbers_in_a_line
from tandem.checkpoints.random_init import RandomSource
from tandem.config.settings import (
    CheckpointSettings,
    ExpertSettings,
    LoraSettings,
    ModelSettings,
    PreferenceSettings,
)
from tandem.errors import Problems, UserError, raise_all
from tandem.models.config import DESCRIPTIVE, ModelConfig, RotaryScaling
from tandem.models.experts import parse_layer_freq, sparse_layers
from tandem.models.hf_config import from_hf
from tandem.options import flag_of
from tandem.training.logs.log import log_notice
from tandem.training.start.lora import with_adapters
from tandem.training.start.saved import open_initial

# Flags that must agree with the config.json of the weights.
COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "norm_epsilon",
    "rotary_base",
)
ROTARY_FLAGS = (
    *("rope_scaling_type", "rope_scaling_factor", "rope_scaling_original_max_position_embeddings"),
    *("rope_scaling_mscale", "rope_scaling_mscale_all_dim", "beta_fast", "beta_slow"),
)


def open_weights(
    checkpoint: CheckpointSettings,
    lora: LoraSettings,
    model: ModelSettings,
    tokenizer_folder: str | None,
    seed: int,
    base: str | None = None,
) -> TensorSource:
    """The weights of `--load`, or random weights from `seed`; with adapters, if there are or shall be any.

    Random weights need a config.json, from `--hf-cfg-dir` or from the tokenizer's folder. A checkpoint of Megatron
    takes that of `--hf-cfg-dir`.

    Args:
        base: where the weights of saved adapters are looked for, too, if they are not where they were.
    """
    if checkpoint.load is not None:
        config = _config_of(companions_of(model.hf_cfg_dir), model.hf_cfg_dir) if model.hf_cfg_dir else None
        weights_only = checkpoint.finetune
        source = open_initial(
            checkpoint.load, checkpoint.ckpt_step, weights_only=weights_only, config=config, base=base
        )
        if config is not None:
            _check_described(config, source, f"--hf-cfg-dir {model.hf_cfg_dir}")
        for notice in source.notices:
            log_notice(notice)
    else:
        source = _random_weights(model, tokenizer_folder, seed)
    resumes = checkpoint.load is not None and checkpoint.load == checkpoint.save
    return with_adapters(source, lora, seed, resumes=resumes)


def _random_weights(model: ModelSettings, tokenizer_folder: str | None, seed: int) -> TensorSource:
    folder = model.hf_cfg_dir or tokenizer_folder
    if folder is None:
        raise UserError("--init random needs the model's config.json: give its folder with --hf-cfg-dir")
    companions = companions_of(folder)
    config = _config_of(companions, folder)
    if model.init_method_std is not None:
        config = dataclasses.replace(config, init_method_std=model.init_method_std)
    return RandomSource(config, seed, companions=companions)


def _config_of(companions: Companions, folder: str) -> ModelConfig:
    return from_hf(companions.hf_config or {}, where=f"{folder}/config.json")


def _check_described(config: ModelConfig, source: TensorSource, where: str) -> None:
    """Raise UserError when weights that describe themselves are of another model than `config` describes."""
    asked, actual = config.to_dict(), source.config.without_adapters.to_dict()
    for values in (asked, actual):
        values.get("experts", {}).pop("router_aux_loss_coef", None)  # training has a setting of its own
    names = [name for name in dict.fromkeys((*actual, *asked)) if asked.get(name) != actual.get(name)]
    names = [name for name in names if name not in DESCRIPTIVE]
    if names:
        differences = "; ".join(f"{name} {actual.get(name)}, not {asked.get(name)}" for name in names)
        raise UserError(
            f"{where} describes another model than that of {source.location}, which has {differences}. Leave it out, "
            f"or change the config.json of the weights"
        )


def check_model_flags(
    model: ModelSettings,
    experts: ExpertSettings,
    seq_length: int,
    config: ModelConfig,
    noop_layers: Collection[int] = (),
) -> None:
    """Raise a UserError that lists every model flag that contradicts the config of the weights, and `--seq-length`.

    `noop_layers`: `--num-layers` may count them, as upstream's scripts do, and the model does not have them.
    """
    problems = [
        *_wrong_model_flags(model, seq_length, config, len(noop_layers)),
        *_wrong_expert_flags(experts, config),
        *_wrong_layers_of_experts(experts, config, noop_layers),
    ]
    raise_all(problems)


def _wrong_model_flags(model: ModelSettings, seq_length: int, config: ModelConfig, noop_layers: int) -> Iterator[str]:
    for name in COMPARED:
        given, actual = getattr(model, name), getattr(config, name)
        if name == "num_layers" and given == actual + noop_layers:
            continue
        if given is not None and given != actual:
            yield _contradiction(name, given, actual)
    other_rotary = list(_wrong_rotary_flags(model, config.rotary_scaling))
    yield from other_rotary
    if model.untie_embeddings_and_output_weights and config.tied:
        yield (
            "--untie-embeddings-and-output-weights contradicts the weights' config: its embeddings are tied: leave it "
            "out"
        )
    if model.padded_vocab_size is not None and model.padded_vocab_size < config.vocab_size:
        yield (
            f"--padded-vocab-size {model.padded_vocab_size}: expected at least {config.vocab_size}, the "
            f"vocabulary size of the model"
        )
    bound = model.max_position_embeddings or config.max_position_embeddings
    if seq_length > bound and not other_rotary:  # another scaling has another bound
        yield f"--seq-length {seq_length} is above max_position_embeddings {bound}: give --seq-length {bound}, or less"


def _contradiction(name: str, given: object, actual: object) -> str:
    return f"{flag_of(name)} {given} contradicts the weights' config, which has {actual}: give that, or leave it out"


def _wrong_expert_flags(given: ExpertSettings, config: ModelConfig) -> Iterator[str]:
    """Flags of experts that contradict the config of the weights.

    Megatron's router normalises the factors of a token unless it is told to take the softmax before it chooses.
    """
    compared = ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")
    others = ("moe_layer_freq", "first_k_dense_replace", "moe_expert_capacity_factor")
    values = {name: value for name in (*compared, *others) if (value := getattr(given, name)) is not None}
    if config.experts is None:
        for name, value in values.items():
            yield (
                f"{flag_of(name)} {value}: the weights' config has no experts (model_type {config.model_type}): "
                f"leave it out"
            )
        return
    for name in compared:
        if name in values and values[name] != (actual := getattr(config.experts, name)):
            yield _contradiction(name, values[name], actual)
    if config.experts.norm_topk_prob == given.norm_topk_prob:
        return
    if given.norm_topk_prob:
        yield ("--norm-topk-prob contradicts the weights' config, whose norm_topk_prob is false: leave it out")
    elif given.moe_router_pre_softmax or given.moe_router_load_balancing_type == "softmax_topk":
        yield (
            "--moe-router-pre-softmax (or softmax_topk) without --norm-topk-prob contradicts the weights' config: its "
            "norm_topk_prob is true: add --norm-topk-prob"
        )


def _wrong_layers_of_experts(given: ExpertSettings, config: ModelConfig, noop_layers: Collection[int]) -> Iterator[str]:
    """Flags that put experts into other layers than the config of the weights."""
    flags = {
        flag_of(name): value
        for name in ("moe_layer_freq", "first_k_dense_replace")
        if (value := getattr(given, name)) is not None
    }
    if not flags or config.experts is None:
        return
    words = " ".join(f"{flag} {value}" for flag, value in flags.items())
    try:
        frequency = 1 if given.moe_layer_freq is None else parse_layer_freq(given.moe_layer_freq)
    except UserError as error:
        yield str(error)
        return
    slots = config.num_layers + len(noop_layers)
    asked = sparse_layers(frequency, given.first_k_dense_replace or 0, slots, noop_layers)
    actual = [config.experts.are_in(layer) for layer in range(config.num_layers)]
    if asked is None:
        yield f"{words}: expected a mark for each of {slots} layers"
    elif asked != actual:
        without = [layer for layer, has_experts in enumerate(actual) if not has_experts]
        where = f"in all layers but {numbers_in_a_line(without)}" if without else "in all layers"
        yield f"{words} contradicts the weights' config, which has experts {where}: leave it out"


def open_reference(preferences: PreferenceSettings, config: ModelConfig) -> TensorSource | None:
    """The weights of `--ref-model`; None when it is not given.

    Raises:
        UserError: it is no model, or another than the one that is trained.
    """
    if preferences.ref_model is None:
        return None
    try:
        source = open_source(preferences.ref_model, preferences.refer_model_iter)
    except UserError as error:
        raise UserError(f"--ref-model: {error}") from error
    if source.config.without_adapters != config.without_adapters:
        raise UserError(
            f"--ref-model {preferences.ref_model}: expected a model of the same shape as the one that is trained"
        )
    return source


def _wrong_rotary_flags(model: ModelSettings, actual: RotaryScaling | None) -> Iterator[str]:
    """MindSpeed-LLM's flags for YaRN, when they ask for another model than config.json describes."""
    given = {name: value for name in ROTARY_FLAGS if (value := getattr(model, name)) is not None}
    if not given:
        return
    if "rope_scaling_type" not in given:
        yield f"{flag_of(next(iter(given)))} needs --rope-scaling-type yarn"
        return
    needed = ("rope_scaling_factor", "rope_scaling_original_max_position_embeddings")
    if absent := [flag_of(name) for name in needed if name not in given]:
        yield f"--rope-scaling-type yarn needs {' and '.join(absent)}"
        return
    problems = Problems()
    asked = None
    with problems.noted():
        asked = scaling_from_args(given, "--rope-scaling-type yarn")
    yield from problems.texts
    if asked is None:
        return
    if actual is None or _computed(asked) != _computed(actual):
        written = {"rope_type": "yarn", "factor": asked.factor}
        written["original_max_position_embeddings"] = asked.original_max_position_embeddings
        written |= {name: getattr(asked, name) for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
        written["attention_factor"] = asked.attention_factor
        text = json.dumps({name: value for name, value in written.items() if value is not None})
        yield (
            f"--rope-scaling-type yarn contradicts the weights' config, which has "
            f"{'no rotary scaling' if actual is None else 'another rotary scaling'}: write into rope_scaling of its "
            f"config.json, and into rope_parameters if that is there, {text}"
        )


def _computed(scaling: RotaryScaling) -> tuple[object, ...]:
    """What a scaling computes with. Its amplitude may be told in several ways."""
    lengths = scaling.factor, scaling.original_max_position_embeddings
    return scaling.kind, *lengths, scaling.beta_fast, scaling.beta_slow, scaling.truncate, round(scaling.amplitude, 9)
