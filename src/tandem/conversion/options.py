"""The options of conversion and of export; those of conversion are named as the flags of MindSpeed-LLM's converters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Literal

from tandem.checkpoints.interface import TensorSource
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora, check_stated
from tandem.options import Options, PathText, as_typed, flag_of, positional
from tandem.parallel.layout import Layout, parse_layers


@dataclass(frozen=True, kw_only=True)
class StatedModel:
    """Model: read from config.json; a flag that contradicts it stops the conversion."""

    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads."""
    kv_channels: int | None = None
    """Channels of a head (head_dim)."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm."""
    rotary_base: float | None = None
    """Base of the rotary frequencies (rope_theta)."""
    true_vocab_size: int | None = None
    """Rows of the embedding, without padding."""
    qk_layernorm: bool | None = None
    """Queries and keys are normalised."""
    add_qkv_bias: bool | None = None
    """Queries, keys and values have a bias."""
    untie_embeddings_and_output_weights: bool | None = None
    """The output head is a tensor of its own."""

    def check(self, config: ModelConfig, where: str) -> None:
        """Raise UserError, with both values, when a flag contradicts `config`."""
        for stated in fields(self):
            value = getattr(self, stated.name)
            actual = getattr(config, stated.name.removeprefix("true_"))
            if value is not None and value != actual:
                raise UserError(f"{as_typed(stated.name, value)} contradicts the config of {where}, which has {actual}")


# The options that give a field of the target's layout another name.
TARGETS = {
    "tensor_model_parallel_size": "target_tensor_parallel_size",
    "pipeline_model_parallel_size": "target_pipeline_parallel_size",
    "expert_model_parallel_size": "target_expert_parallel_size",
}


@dataclass(frozen=True)
class ConvertOptions(Options):
    """Options of `tandem convert`, named as the flags of MindSpeed-LLM's converters."""

    load_dir: PathText = field(metadata=positional("SOURCE", flag_too=True, also=("--load",)))
    """Source folder; with --load-model-type random, the folder that holds config.json and the tokenizer."""
    save_dir: PathText = field(metadata=positional("TARGET", flag_too=True))
    """Target folder; must not hold anything yet. For hf, a folder with a model is taken as the origin of config and
    tokenizer, and the weights go to its subfolder mg2hf, as upstream does."""
    _: KW_ONLY
    load_model_type: Literal["hf", "mg", "random"] = "hf"
    """What --load-dir holds: hf, mg (native, torch or torch_dist, recognised), or random: random weights for a
    config.json."""
    save_model_type: Literal["mg", "hf"] = "mg"
    """What to write: mg (Megatron-core layout) or hf."""
    ckpt_step: int | None = None
    """Iteration of the source; default: the newest."""
    target_tensor_parallel_size: int = 1
    """Tensor-parallel ranks to write for."""
    target_pipeline_parallel_size: int = 1
    """Pipeline stages to write for."""
    target_expert_parallel_size: int = 1
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that cut each expert: 1, or --target-tensor-parallel-size, which is the default."""
    moe_tp_extend_ep: bool = False
    """Tensor-parallel ranks share experts, too, and do not cut them."""
    moe_grouped_gemm: bool = False
    """For torch: all experts of a rank in one tensor, as for Megatron's grouped products; with --transformer-impl
    transformer_engine, its names of them. Otherwise each expert has tensors of its own."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk, for interleaved stages."""
    num_layer_list: str | None = None
    """Layers of each stage, such as 10,18; not with virtual stages or noop layers."""
    noop_layers: str | None = None
    """Slots left empty, such as 0,29, counted with these slots in the stack. For mg -> hf: the source's."""
    source_num_layer_list: str | None = None
    """--num-layer-list of a source that does not record it."""
    source_noop_layers: str | None = None
    """--noop-layers of a source that does not record them."""
    num_layers: int | None = None
    """Keep only the first layers of a Hugging Face model, for debugging; excludes noop layers."""
    resize_vocab: int | None = None
    """Rows of the embedding and the output head to write, more than the source has, for a tokenizer with added tokens.
    Each new row is the mean of the others. With --load-model-type hf --save-model-type hf, too."""
    params_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype to write; default: the source's."""
    ckpt_format: Literal["native", "torch", "torch_dist"] = "native"
    """mg layout on disk: native (safetensors) or torch (Megatron-LM's and MindSpeed's pickles). torch_dist is read, and
    recognised, but not written."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """For torch: names of the norms, as Megatron's local layers or Transformer Engine's fused ones have them."""
    make_vocab_size_divisible_by: int | None = None
    """For torch: pad the vocabulary to a multiple of this times the tensor-parallel size; default: do not."""
    padded_vocab_size: int | None = None
    """For torch: pad the vocabulary to this many rows. Export removes the padding."""
    model_type_hf: str | None = None
    """Family that the source must have, such as qwen3."""
    hf_cfg_dir: PathText | None = None
    """Take config and tokenizer files from this folder."""
    lora_load: PathText | None = None
    """Folder of adapters to merge into the weights: PEFT's, a run's, or Megatron torch files of MindSpeed-LLM."""
    lora_r: int | None = None
    """Rank of the adapters; another one than theirs is an error."""
    lora_alpha: float | None = None
    """Their alpha, for Megatron torch files that do not record it; another one than theirs is an error."""
    lora_target_modules: tuple[str, ...] = ()
    """Their modules; others than theirs are an error."""
    save_lora_to_hf: bool = False
    """Write the adapters alone, as a PEFT folder, instead of merging them."""
    seed: int = 1234
    """Seed of random weights."""
    ai_framework: Literal["torch", "pytorch", "mindspore"] | None = None
    """Framework that computes the logits of --verify; default: the one installed. Bytes do not depend on it."""
    verify: bool = False
    """Compare the logits of source and result; without it, those of small models only. Where transformers is installed,
    it reads and computes a Hugging Face side."""
    no_verify: bool = False
    """Never compare the logits."""
    stated: StatedModel = field(default_factory=StatedModel)

    def problems(self) -> Iterator[str]:
        if (self.save_model_type, self.ckpt_format) == ("mg", "torch_dist"):
            yield (
                "--ckpt-format torch_dist is read, but not written: write --ckpt-format torch, which Megatron loads, "
                "and saves as torch_dist if it is asked to"
            )
        if self.num_layers is not None and self.load_model_type == "mg":
            yield "--num-layers keeps the first layers of a Hugging Face model, not of a checkpoint"
        if self.num_layers is not None and self.noop_layers:
            yield "--num-layers and --noop-layers exclude each other"
        for name in ("make_vocab_size_divisible_by", "padded_vocab_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                yield f"{flag_of(name)} {value}: expected 1 or more"
        if self.padded_vocab_size is not None and self.make_vocab_size_divisible_by not in (None, 1):
            yield "--padded-vocab-size and --make-vocab-size-divisible-by exclude each other"
        if self.verify and self.no_verify:
            yield "--verify and --no-verify exclude each other"
        if self.save_lora_to_hf and self.save_model_type != "hf":
            yield "--save-lora-to-hf writes a PEFT folder: add --save-model-type hf"

    def check_work(self, source: TensorSource) -> None:
        """Raise UserError when the result would be what the source is."""
        kept = source.format.load_model_type == self.save_model_type == "hf" and source.config.lora is None
        if kept and (self.num_layers, self.resize_vocab, self.params_dtype) == (None, None, None):
            raise UserError(
                f"--load-model-type hf --save-model-type hf: nothing to convert: {self.load_dir} is a Hugging Face "
                f"folder already. --lora-load, --params-dtype, --resize-vocab and --num-layers change one"
            )

    def target_layout(self) -> Layout:
        """The layout to write."""
        return Layout(
            tensor_model_parallel_size=self.target_tensor_parallel_size,
            pipeline_model_parallel_size=self.target_pipeline_parallel_size,
            num_layers_per_virtual_pipeline_stage=self.num_layers_per_virtual_pipeline_stage,
            num_layer_list=parse_layers("--num-layer-list", self.num_layer_list),
            noop_layers=parse_layers("--noop-layers", self.noop_layers) or (),
            expert_model_parallel_size=self.target_expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            moe_tp_extend_ep=self.moe_tp_extend_ep,
        )

    def check_layout(self, config: ModelConfig) -> None:
        """Raise UserError when `config` cannot be laid out as the flags say."""
        self.target_layout().check(config, lambda name, value: as_typed(TARGETS.get(name, name), value))

    def source_layers(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """The source's noop layers and its layer list, as the flags give them; None where they do not.

        For mg -> hf there is no target layout, and upstream gives the source's layers with the target's flags.
        """
        noop, uneven = self.source_noop_layers, self.source_num_layer_list
        if self.save_model_type == "hf":
            noop, uneven = noop or self.noop_layers, uneven or self.num_layer_list
        return parse_layers("--source-noop-layers", noop), parse_layers("--source-num-layer-list", uneven)

    def check_adapters(self, actual: Lora | None, where: str) -> None:
        """Raise UserError, with both values, when a flag contradicts the adapters that are converted."""
        given = {name: getattr(self, name) for name in ("lora_r", "lora_alpha", "lora_target_modules")}
        if actual is None and self.save_lora_to_hf:
            given["save_lora_to_hf"] = True
        check_stated(actual, given, where)

    def without_effect(self) -> list[str]:
        """Flags that were given and have no effect on this target."""
        idle: list[str] = []
        if (self.save_model_type, self.ckpt_format) != ("mg", "torch"):
            idle += ["transformer_impl", "make_vocab_size_divisible_by", "padded_vocab_size", "moe_grouped_gemm"]
        if self.save_lora_to_hf:
            idle += ["params_dtype", "resize_vocab", "num_layers"]
        if self.save_model_type == "hf":
            idle += ["target_tensor_parallel_size", "target_pipeline_parallel_size"]
            idle += ["num_layers_per_virtual_pipeline_stage", "ckpt_format", "target_expert_parallel_size"]
            idle += ["expert_tensor_parallel_size", "moe_tp_extend_ep"]
        defaults = {item.name: item.default for item in fields(self)}
        return [flag_of(name) for name in idle if getattr(self, name) != defaults[name]]


@dataclass(frozen=True)
class ExportOptions(Options):
    """Options of `tandem export`."""

    load: PathText = field(metadata=positional("CHECKPOINT", flag_too=True))
    """Checkpoint folder, of a training run or of a conversion."""
    save_dir: PathText = field(metadata=positional("TARGET", flag_too=True))
    """Folder for the Hugging Face model; must not hold anything yet."""
    _: KW_ONLY
    params_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype to write; default: the checkpoint's."""
    gguf: Literal["f16", "bf16", "q8_0"] | None = None
    """Write one GGUF file of this encoding into the folder, for llama.cpp and Ollama, and no Hugging Face model."""
    ckpt_step: int | None = None
    """Iteration to export; default: the newest."""
    lora_load: PathText | None = None
    """Folder of adapters to merge into the weights: PEFT's, or a run's. A run that trained adapters names its weights
    itself."""
    save_lora_to_hf: bool = False
    """Write the adapters alone, as a PEFT folder, instead of merging them."""
    hf_cfg_dir: PathText | None = None
    """Take config and tokenizer files from this folder instead of the checkpoint."""
    ai_framework: Literal["torch", "pytorch", "mindspore"] | None = None
    """Framework that computes the checkpoint's logits for --verify; default: the one installed."""
    verify: bool = False
    """Compare the logits of the checkpoint with those of the folder; without it, those of small models only. Where
    transformers is installed, it reads and computes the folder."""
    no_verify: bool = False
    """Never compare the logits, nor read a GGUF file back."""
    no_certificate: bool = False
    """Write no certificate.json, which says what training computes on fixed prompts (`tandem verify`)."""

    def problems(self) -> Iterator[str]:
        if self.verify and self.no_verify:
            yield "--verify and --no-verify exclude each other"
        if self.save_lora_to_hf and self.verify:
            yield "--save-lora-to-hf and --verify exclude each other: adapters alone compute nothing"
        if self.gguf and self.save_lora_to_hf:
            yield "--gguf and --save-lora-to-hf exclude each other: a GGUF file holds the whole model"
        if self.gguf and self.save_dir.endswith(".gguf"):
            yield f"TARGET (--save-dir) {self.save_dir}: is the folder of the file; give another name"
        if self.gguf and self.params_dtype:
            yield f"--gguf {self.gguf} and --params-dtype exclude each other: --gguf chooses how numbers are stored"
