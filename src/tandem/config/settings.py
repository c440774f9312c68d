"""The settings of a training run, in groups. Every field is a flag under its Megatron name, and a YAML key.

A field's docstring is its help text. `None` means "not given": the model's values then come from `config.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem.config.lengths import BatchSizes, RunLength
from tandem.frameworks import default_framework
from tandem.options import PathText, aliases, as_groups
from tandem.parallel.layout import Layout, parse_layers


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model: normally read from config.json; a flag that contradicts it stops the run."""

    num_layers: int | None = None
    """Decoder layers."""
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
    max_position_embeddings: int | None = None
    """Upper bound of --seq-length."""
    padded_vocab_size: int | None = None
    """Rows of the embedding, when given: at least the vocabulary of config.json. Padding never reaches the disk."""
    make_vocab_size_divisible_by: int | None = None
    """Accepted for scripts that pass it; the vocabulary keeps the size that config.json gives."""
    untie_embeddings_and_output_weights: bool = False
    """The output head is a tensor of its own."""
    init_method_std: float | None = None
    """Standard deviation of random initial weights."""
    attention_dropout: float = 0.0
    """Only 0 is supported."""
    hidden_dropout: float = 0.0
    """Only 0 is supported."""
    hf_cfg_dir: PathText | None = None
    """Folder with the config.json of a model that starts from random weights; default: the tokenizer's folder."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Parallelism: how the model is spread over processes."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each tensor."""
    pipeline_model_parallel_size: int = 1
    """Stages of layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk, for interleaved stages (PyTorch only)."""
    num_layer_list: str | None = None
    """Layers of each stage, such as 10,18; excludes virtual stages and noop layers."""
    noop_layers: str | None = None
    """Slots left empty, such as 0,29, counted in the stack that they lengthen."""
    context_parallel_size: int = 1
    """Only 1."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence; without effect when tensor_model_parallel_size is 1."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks; without effect on one rank."""
    use_torch_fsdp2: bool = False
    """Shard weights and gradients over data-parallel ranks, too (PyTorch only)."""
    distributed_timeout_minutes: int = 10
    """How long ranks wait for one that is late."""

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=self.num_layers_per_virtual_pipeline_stage,
            num_layer_list=parse_layers("--num-layer-list", self.num_layer_list),
            noop_layers=parse_layers("--noop-layers", self.noop_layers) or (),
        )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data."""

    data_path: tuple[PathText, ...] = ()
    """Prefix of the preprocessed files: PREFIX.bin/.idx for pretraining, PREFIX_packed_*_document for instructions.
    Several are blended by their sizes, or by weights: WEIGHT PREFIX WEIGHT PREFIX. Raw files (.jsonl, .parquet, ...),
    folders and patterns are preprocessed first, and found in a cache the next time."""
    data_cache_path: PathText | None = None
    """Folder for what raw files become; default: beside them."""
    handler_name: str = ""
    """How the records of raw files are read; default: recognised by the first one's fields."""
    json_keys: tuple[str, ...] = ("text",)
    """Field of raw text files; one."""
    map_keys: str | None = None
    """Other field names of raw instruction data, as JSON."""
    append_eod: bool = False
    """End each document of raw files with the end-of-document token."""
    workers: int = 1
    """Processes that tokenise raw files."""
    valid_data_path: tuple[PathText, ...] = ()
    """Validation sets in place of the split's: NAME=PREFIX ..., reported separately, or one PREFIX alone. Raw
    files will do, too."""
    split: str = "969,30,1"
    """Proportions of train, validation and test."""
    seq_length: int = 4096
    """Tokens of a sample."""
    tokenizer_type: str = "PretrainedFromHF"
    """Only PretrainedFromHF."""
    tokenizer_name_or_path: PathText | None = None
    """Folder of the Hugging Face tokenizer."""
    prompt_type: str | None = None
    """Chat template of the instruction data; must agree with the data's record, which names it when this does not."""
    enable_thinking: Literal["true", "false", "none"] | None = None
    """Thinking mode of --prompt-type; must agree with the data's record, which names it when this does not."""
    reset_position_ids: bool = False
    """Restart positions after each end-of-document token."""
    reset_attention_mask: bool = False
    """No attention across end-of-document tokens."""
    eod_mask_loss: bool = False
    """Do not train the prediction of end-of-document tokens' successors."""
    pack: bool = False
    """Fill samples of instruction data up to --seq-length with several conversations, which do not see each other. Data
    that `tandem preprocess --pack` wrote are packed already and taken as they are."""
    neat_pack: bool = False
    """Refuse data packed without borders between conversations. --pack needs no more: it keeps them apart."""
    no_shuffle: bool = False
    """Take instruction data in file order."""
    no_pad_to_seq_lengths: bool = False
    """Accepted for scripts that pass it: batches never hold padding."""
    variable_seq_lengths: bool = False
    """Accepted for scripts that pass it: batches never hold padding."""
    is_instruction_dataset: bool = False
    """Read instruction data (always so in `tandem finetune`)."""
    stage: Literal["sft"] | None = None
    """Post-training stage; only sft."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer and learning-rate schedule."""

    lr: float | None = None
    """Peak learning rate."""
    min_lr: float = 0.0
    """Floor of the schedule."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Iterations over which the rate decays; default: --train-iters."""
    lr_decay_samples: int | None = None
    """With --train-samples: samples over which the rate decays; default: --train-samples."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """With WSD: shape of the annealing at the end."""
    lr_wsd_decay_iters: int | None = None
    """With WSD: iterations of annealing, the last of the decay iterations."""
    lr_wsd_decay_samples: int | None = None
    """With WSD and --train-samples: samples of annealing."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    lr_warmup_samples: int = 0
    """With --train-samples: samples of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the decay; excludes --lr-warmup-iters and --lr-warmup-samples."""
    lr_warmup_init: float = 0.0
    """Rate at which warm-up begins."""
    weight_decay: float = 0.01
    """Decoupled weight decay; not applied to 1-D tensors."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the weight decay's way from --start-weight-decay to --end-weight-decay over the whole run."""
    start_weight_decay: float | None = None
    """Weight decay of the first step, when it changes."""
    end_weight_decay: float | None = None
    """Weight decay at the end of the run, when it changes."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global norm of the gradients; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Training."""

    ai_framework: str = field(default_factory=default_framework)
    """Backend: mindspore, or torch (also: pytorch); default: the one that is installed, torch where both are."""
    device: str | None = None
    """cpu, cuda or npu; default: the best one present."""
    micro_batch_size: int = 1
    """Samples of one forward pass."""
    global_batch_size: int | None = None
    """Samples of one step; default: --micro-batch-size."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """With --train-samples: first batch size, increment, and the samples over which it grows to the global one."""
    train_iters: int | None = None
    """Steps of the whole run."""
    train_samples: int | None = None
    """Samples of the whole run, in place of --train-iters."""
    epochs: float | None = None
    """Passes over the training samples, in place of --train-iters; a fraction is allowed. Rounded up to whole steps."""
    exit_interval: int | None = None
    """Save and leave after an iteration that is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save and leave after the step that ends later than this."""
    seed: int = 1234
    """Seed of random weights and of the order of the data."""
    deterministic_mode: bool = field(default=False, metadata=aliases("--deterministic", "--npu-deterministic"))
    """The same bits each time on the same devices, at the price of speed; a CPU computes so anyway."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights, where the device computes bfloat16."""
    fp16: bool = False
    """Compute in float16 with fp32 master weights and a loss scale."""
    loss_scale: float | None = None
    """With --fp16: a constant loss scale; default: a dynamic one."""
    initial_loss_scale: float = 2.0**32
    """With --fp16: first dynamic loss scale."""
    min_loss_scale: float = 1.0
    """With --fp16: the dynamic loss scale does not fall below this."""
    loss_scale_window: int = 1000
    """With --fp16: steps without overflow after which the loss scale doubles."""
    hysteresis: int = 2
    """With --fp16: overflows before the loss scale halves."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradient norm is not finite, or whose loss is 0 or a spike: stop, or count it and go
    on. Such a step never changes weights."""
    no_check_for_nan_in_loss_and_grad: bool = False
    """Megatron's name for --on-bad-step skip."""
    max_consecutive_skips: int = 10
    """With --on-bad-step skip: stop after more than so many in a row."""
    check_for_spiky_loss: bool = False
    """Take a loss for bad that is above --spiky-loss-factor times the mean of the last 100."""
    spiky_loss_factor: float = 2.0
    """What is a spike; Megatron's is 10 times the largest."""
    recompute_granularity: Literal["full"] | None = None
    """Activation recompute: full keeps only each layer's input."""
    recompute_method: Literal["uniform", "block"] | None = None
    """uniform recomputes every layer, block the first --recompute-num-layers."""
    recompute_num_layers: int | None = None
    """With block: how many layers recompute."""
    eval_interval: int = 1000
    """Steps between evaluations on the validation split."""
    eval_iters: int | Literal["full"] = 100
    """Global batches of one evaluation, at most the whole set; full takes all of it, and 0 turns evaluation off."""

    @property
    def final_batch_size(self) -> int:
        """Samples of one step, once the batch size is no longer ramped up."""
        return self.global_batch_size or self.micro_batch_size

    @property
    def length(self) -> RunLength:
        final = self.final_batch_size
        return RunLength(BatchSizes(final, *(self.rampup_batch_size or (final,))), self.train_iters, self.train_samples)

    @property
    def eval_batches(self) -> int | None:
        """Global batches of one evaluation; None for all of a set."""
        return None if self.eval_iters == "full" else self.eval_iters


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Logs, beside the metrics.jsonl that --save keeps."""

    log_interval: int = 100
    """Steps between log lines."""
    log_throughput: bool = False
    """Add TFLOP/s to the log line."""
    no_live_view: bool = False
    """Plain lines only, on a terminal, too."""
    tensorboard_dir: PathText | None = None
    """Folder for TensorBoard's files, under Megatron's tags."""
    tensorboard_log_interval: int = 1
    """Steps between TensorBoard's points."""
    profile: bool = False
    """Run the framework's profiler over some steps, on the first rank."""
    profile_step_start: int = 10
    """Iteration after which profiling begins."""
    profile_step_end: int = 12
    """Last iteration that is profiled."""
    profile_save_path: PathText | None = None
    """Folder for the profiler's files; default: profile in --save."""
    wandb_project: str | None = None
    """Project on Weights & Biases; without it nothing is sent there."""
    wandb_exp_name: str | None = None
    """Name of the run there; default: theirs."""
    wandb_entity: str | None = None
    """User or team there; default: the one that is logged in."""
    wandb_save_dir: PathText | None = None
    """Folder for its local files; default: wandb in --save."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints."""

    load: PathText | None = None
    """Folder of the initial weights or of the run to resume: Hugging Face, native, or Megatron torch."""
    ckpt_step: int | None = None
    """Iteration to load; default: the newest."""
    init: Literal["random"] | None = None
    """Start from random weights; excludes --load."""
    save: PathText | None = None
    """Folder for checkpoints."""
    save_interval: int | None = None
    """Steps between saves; the last step is always saved."""
    async_save: bool = False
    """Training waits for a copy in host memory only; a thread writes it to the disk."""
    save_total_limit: int | None = field(default=None, metadata=aliases("--keep-last"))
    """Keep the newest so many checkpoints, and remove older ones once a new one is on the disk; default: all."""
    save_retain_interval: int | None = field(default=None, metadata=aliases("--keep-every"))
    """Keep checkpoints of iterations that are a multiple of this, beside the newest --save-total-limit (default 1)."""
    export_hf_every: int | None = None
    """Write checkpoints of iterations that are a multiple of this as Hugging Face folders, too, in SAVE/hf."""
    finetune: bool = False
    """Load weights only: start at iteration 0 with a fresh optimizer."""
    no_load_optim: bool = False
    """Do not load the optimizer."""
    no_load_rng: bool = False
    """Take the seed from the settings, not from the checkpoint."""
    no_save_optim: bool = False
    """Do not save the optimizer."""
    exit_on_missing_checkpoint: bool = False
    """Accepted for scripts that pass it: a missing checkpoint always ends the run."""
    no_shared_storage: bool = False
    """Every machine has a disk of its own: each prepares its data and keeps its ranks' part of a checkpoint."""
    ckpt_format: Literal["native", "torch"] = "native"
    """Layout of saved checkpoints. Training always saves native; torch is written by `tandem convert`."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """Processes: with --nproc-per-node, tandem starts them itself, with torchrun or msrun."""

    nproc_per_node: int | None = None
    """Processes to start on this machine; without it, those of the launcher that started this one."""
    nnodes: int = 1
    """Machines; the same command runs on each."""
    node_rank: int = 0
    """Number of this machine."""
    master_addr: str = "127.0.0.1"
    """Address of machine 0."""
    master_port: int | None = None
    """Port on machine 0; default: a free one on a single machine, 29500 on several."""
    log_dir: PathText | None = None
    """Folder for each started process's output, rank_N.log; default: it is kept only when the job fails."""
    dry_run: bool = False
    """Check settings, weights, data and disk for so many processes, say what would run, and leave."""


GROUPS: dict[str, type] = {
    "model": ModelSettings,
    "parallel": ParallelSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "training": TrainingSettings,
    "checkpoint": CheckpointSettings,
    "launch": LaunchSettings,
    "logging": LoggingSettings,
}


@dataclass(frozen=True, init=False)
class Settings:
    """Everything that defines a training run.

    Settings are given by name, groups as a whole, or both: `Settings(lr=1e-3, train_iters=10)`,
    `Settings(optimizer=OptimizerSettings(lr=1e-3))`.
    """

    model: ModelSettings
    parallel: ParallelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    training: TrainingSettings
    checkpoint: CheckpointSettings
    launch: LaunchSettings
    logging: LoggingSettings

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            UserError: names every unknown setting, and every value of another type.
        """
        named = {name: value for name, value in values.items() if name not in GROUPS}
        groups = as_groups(Settings, named) if named else {}
        for name, group in GROUPS.items():
            given = values.get(name, group())
            object.__setattr__(self, name, dataclasses.replace(given, **groups.get(name, {})))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Groups of plain values, as YAML and JSON hold them."""
        return {group.name: plain_values(getattr(self, group.name)) for group in dataclasses.fields(self)}


def plain_values(group: Any) -> dict[str, Any]:
    """A group's values by name, as YAML and JSON hold them."""
    values = dataclasses.asdict(group)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
