"""The settings of a training run, in groups. Every field is a flag with Megatron's name, and a YAML key.

The text below a field is its help. `None` means "not given": values of the model then come from `config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem.config.lengths import BatchSizes, RunLength
from tandem.frameworks import default_framework
from tandem.moments import MomentSettings
from tandem.options import PathText, aliases, as_groups
from tandem.parallel.layout import Layout, parse_layers


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model: read from config.json. A flag that contradicts config.json is an error."""

    num_layers: int | None = None
    """Number of decoder layers."""
    hidden_size: int | None = None
    """Width of the hidden states between layers."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads."""
    kv_channels: int | None = None
    """Size of one head (head_dim)."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm."""
    rotary_base: float | None = None
    """Base of the rotary frequencies (rope_theta)."""
    rope_scaling_type: Literal["yarn"] | None = None
    """Kind of rotary scaling. This flag and the next six are MindSpeed-LLM's; rope_scaling of config.json decides."""
    rope_scaling_factor: float | None = None
    """How many times longer texts become."""
    rope_scaling_original_max_position_embeddings: int | None = None
    """How long texts were before."""
    rope_scaling_mscale: float | None = None
    """How much longer queries and keys become."""
    rope_scaling_mscale_all_dim: float | None = None
    """By how much less than --rope-scaling-mscale says."""
    beta_fast: float | None = field(default=None, metadata=aliases("--rope-scaling-beta-fast"))
    """Channels that turn more often in an original text keep their frequency."""
    beta_slow: float | None = field(default=None, metadata=aliases("--rope-scaling-beta-slow"))
    """Channels that turn less often have it divided by the factor."""
    max_position_embeddings: int | None = None
    """Largest --seq-length that is accepted; default: that of config.json."""
    padded_vocab_size: int | None = None
    """Vocabulary size with padding: must be at least the vocabulary size in config.json. Padding is never saved."""
    make_vocab_size_divisible_by: int | None = None
    """Accepted, without effect: the vocabulary always has the size in config.json."""
    untie_embeddings_and_output_weights: bool = False
    """The output layer has its own weights, not those of the embedding."""
    init_method_std: float | None = None
    """Standard deviation of random initial weights; default: initializer_range of config.json."""
    attention_dropout: float = 0.0
    """Dropout in attention. Only 0 is supported."""
    hidden_dropout: float = 0.0
    """Dropout of hidden states. Only 0 is supported."""
    hf_cfg_dir: PathText | None = None
    """Folder with the config.json of a model that starts from random weights (default: the tokenizer folder), or of a
    Megatron checkpoint that does not describe its model."""


@dataclass(frozen=True, kw_only=True)
class ShardingSettings:
    """What ranks split between them, as engines take it."""

    sequence_parallel: bool = False
    """Split norms and residuals along the sequence. Needs --tensor-model-parallel-size above 1 to have an effect."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks. No effect with one data-parallel rank."""
    use_torch_fsdp2: bool = False
    """Shard weights and gradients over data-parallel ranks (PyTorch only)."""
    overlap_grad_reduce: bool = False
    """Sum each layer's gradients over data-parallel ranks while the layers before it compute (PyTorch only; without
    effect elsewhere)."""
    overlap_param_gather: bool = False
    """With --use-distributed-optimizer: gather each layer's new weights while the layers before it compute (PyTorch
    only; without effect elsewhere)."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings(ShardingSettings):
    """Parallelism: how the model is split over processes."""

    tensor_model_parallel_size: int = 1
    """Number of ranks that split each tensor."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages that split the layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved pipeline: layers in each virtual stage."""
    num_layer_list: str | None = None
    """Number of layers on each stage, such as 10,18. Not together with virtual stages or noop layers."""
    noop_layers: str | None = None
    """Layer numbers that stay empty, such as 0,29. They count as layers when stages are filled."""
    context_parallel_size: int = 1
    """Number of ranks that split each sequence. Only 1 is supported."""
    expert_model_parallel_size: int = 1
    """Number of ranks that share the experts of a layer. They are ranks of the same pipeline stage."""
    expert_tensor_parallel_size: int | None = None
    """Number of ranks that split each expert: 1, or --tensor-model-parallel-size, which is the default."""
    moe_tp_extend_ep: bool = False
    """Tensor-parallel ranks share experts, too, and do not split them."""
    distributed_timeout_minutes: int = 10
    """Minutes that ranks wait for each other before the run fails."""

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=self.num_layers_per_virtual_pipeline_stage,
            num_layer_list=parse_layers("--num-layer-list", self.num_layer_list),
            noop_layers=parse_layers("--noop-layers", self.noop_layers) or (),
            expert_model_parallel_size=self.expert_model_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            moe_tp_extend_ep=self.moe_tp_extend_ep,
        )


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """The router of a mixture of experts, as engines take it."""

    moe_router_load_balancing_type: Literal["aux_loss", "pooled_aux_loss", "none", "softmax_topk"] = "aux_loss"
    """How experts are kept equally busy: aux_loss is Megatron's loss, for each layer and micro-batch; pooled_aux_loss
    is Hugging Face's, over all layers at once, in which the same coefficient weighs differently; none is neither;
    softmax_topk is none with --moe-router-pre-softmax."""
    moe_aux_loss_coeff: float = 0.0
    """Coefficient of the load-balancing loss in the gradient. The reported loss leaves it out. 0 turns it off."""
    moe_z_loss_coeff: float | None = None
    """Coefficient of the loss that keeps the router's logits small (z-loss); default: none."""
    moe_router_dtype: Literal["fp32"] | None = None
    """Compute the router's logits and factors in fp32; default: in the dtype of the model."""
    moe_expert_capacity_factor: float | None = None
    """An expert takes at most so many times its even share of a micro-batch's tokens, and drops the others; default: no
    token is dropped."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert keeps: those with the largest factors, or the first ones."""


@dataclass(frozen=True, kw_only=True)
class ExpertSettings(RouterSettings):
    """Mixtures of experts. What config.json says of experts is read from there; a flag that contradicts it is an
    error."""

    num_experts: int | None = None
    """Number of experts in a layer."""
    moe_router_topk: int | None = None
    """Number of experts that each token goes through."""
    moe_ffn_hidden_size: int | None = field(default=None, metadata=aliases("--moe-intermediate-size"))
    """Inner width of one expert."""
    moe_layer_freq: str | None = None
    """Layers with experts: every N-th, from the first; or a mark for each layer, such as '[0]*1+[1]*47'."""
    first_k_dense_replace: int | None = None
    """Layers at the beginning that have no experts."""
    norm_topk_prob: bool = False
    """The factors of a token's experts are divided by their sum."""
    moe_router_pre_softmax: bool = False
    """The factors are probabilities over all experts. Without --norm-topk-prob they are not divided by their sum."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data."""

    data_path: tuple[PathText, ...] = ()
    """Prefix of the preprocessed files: PREFIX.bin/.idx for pretraining, PREFIX_packed_*_document for fine-tuning.
    Several prefixes are mixed by their sizes, or by weights: WEIGHT PREFIX WEIGHT PREFIX. Raw files (.jsonl, .parquet,
    ...), folders and patterns also work: they are preprocessed first, and cached for the next run."""
    data_cache_path: PathText | None = None
    """Folder for preprocessed raw files; default: next to the raw files."""
    handler_name: str = ""
    """Format of the records in raw files; default: detected from the fields of the first record."""
    json_keys: tuple[str, ...] = ("text",)
    """Field that holds the text in raw text files. Only one field."""
    map_keys: str | None = None
    """Field names of raw instruction data, as JSON, when they differ from the usual ones."""
    append_eod: bool = False
    """Add the end-of-document token to each document of raw files."""
    eod_token: str | None = None
    """With --append-eod: the token that ends documents of raw files; default: the tokenizer's eos_token, or the token
    that ends a message."""
    special_tokens_in_text: Literal["encode", "text"] = "encode"
    """What a special token becomes that raw texts spell: itself (encode), or its letters (text)."""
    train_turns: Literal["all", "last"] = "all"
    """Which answers of raw conversations are trained."""
    over_long: Literal["trim", "drop", "stop"] = "trim"
    """What to do with raw conversations longer than --seq-length: cut them turn by turn, leave them out, or stop."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with an unusable row of raw files: stop, or leave it out."""
    workers: int = 1
    """Number of processes that tokenise raw files."""
    valid_data_path: tuple[PathText, ...] = ()
    """Validation sets, used instead of the validation part of --split. Give one PREFIX, or NAME=PREFIX for each of
    several sets, which are reported separately. Raw files also work."""
    split: str = "969,30,1"
    """Shares of the data for training, validation and test."""
    seq_length: int = 4096
    """Number of tokens in a sample."""
    tokenizer_type: str = "PretrainedFromHF"
    """Type of the tokenizer. Only PretrainedFromHF is supported."""
    tokenizer_name_or_path: PathText | None = None
    """Folder of the Hugging Face tokenizer."""
    prompt_type: str | None = None
    """Chat template of the instruction data; default: the one that the data were made with. Another one is an error."""
    enable_thinking: Literal["true", "false", "none"] | None = None
    """Thinking mode of the chat template; default: the one that the data were made with. Another one is an error."""
    reset_position_ids: bool = False
    """Restart position numbers after each end-of-document token."""
    reset_attention_mask: bool = False
    """No attention across end-of-document tokens."""
    eod_mask_loss: bool = False
    """Leave out the loss on the token that follows an end-of-document token."""
    pack: bool = False
    """Put several conversations into each sample of --seq-length tokens. Conversations cannot see each other. Data
    that `tandem preprocess --pack` wrote are already packed and used unchanged."""
    neat_pack: bool = False
    """Refuse data that were packed without borders between conversations. Not needed with --pack."""
    no_shuffle: bool = False
    """Read instruction data in file order."""
    no_pad_to_seq_lengths: bool = False
    """Accepted, without effect: batches never contain padding."""
    variable_seq_lengths: bool = False
    """Accepted, without effect: batches never contain padding."""
    is_instruction_dataset: bool = False
    """Train on instruction data. `tandem finetune` sets this."""
    is_pairwise_dataset: bool = False
    """The data are pairs of answers. Every --stage that needs pairs implies it."""
    stage: Literal["sft", "dpo", "orpo", "simpo", "kto"] | None = None
    """Stage of post-training: sft (the default) trains on answers; dpo, orpo and simpo on pairs of a chosen and a
    rejected answer; kto on answers that are desirable or not."""


@dataclass(frozen=True, kw_only=True)
class AdamSettings(MomentSettings):
    """AdamW, as engines take it."""

    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay rate of Adam's second moment."""
    adam_eps: float = 1e-8
    """Small number added to the root of Adam's second moment."""
    clip_grad: float = 1.0
    """Scale gradients down to this global norm. 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(AdamSettings):
    """Optimizer and learning-rate schedule."""

    lr: float | None = None
    """Peak learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate after the warm-up."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """How the learning rate decays."""
    lr_decay_iters: int | None = None
    """Number of steps over which the learning rate decays; default: --train-iters."""
    lr_decay_samples: int | None = None
    """With --train-samples: samples over which the learning rate decays; default: --train-samples."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """With --lr-decay-style WSD: how the learning rate falls at the end."""
    lr_wsd_decay_iters: int | None = None
    """With --lr-decay-style WSD: number of steps at the end in which the learning rate falls."""
    lr_wsd_decay_samples: int | None = None
    """With --lr-decay-style WSD and --train-samples: samples at the end in which the learning rate falls."""
    lr_warmup_iters: int = 0
    """Number of warm-up steps, in which the learning rate rises linearly."""
    lr_warmup_samples: int = 0
    """With --train-samples: samples of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the decay. Not together with --lr-warmup-iters or --lr-warmup-samples."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    weight_decay: float = 0.01
    """Weight decay of AdamW. Not applied to 1-D tensors."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay changes from --start-weight-decay to --end-weight-decay over the run."""
    start_weight_decay: float | None = None
    """Weight decay of the first step, when it changes during the run."""
    end_weight_decay: float | None = None
    """Weight decay of the last step, when it changes during the run."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On resuming, keep the learning-rate schedule and weight decay that the checkpoint was trained with."""


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Device and precision, as engines take them."""

    device: str | None = None
    """Device: cpu, cuda or npu; default: the best one present."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights, if the device supports bfloat16."""
    fp16: bool = False
    """Compute in float16 with fp32 master weights and a loss scale."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ComputeSettings):
    """Training."""

    ai_framework: str = field(default_factory=default_framework)
    """Framework: torch (or pytorch), or mindspore; default: the installed one, or torch if both are installed."""
    micro_batch_size: int = 1
    """Number of samples in one forward pass."""
    global_batch_size: int | None = None
    """Number of samples in one step; default: --micro-batch-size."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """With --train-samples: grow the batch size. Give the first size, the increment, and over how many samples it grows
    to --global-batch-size."""
    train_iters: int | None = None
    """Number of steps of the whole run."""
    train_samples: int | None = None
    """Number of samples of the whole run, instead of --train-iters."""
    epochs: float | None = None
    """Number of passes over the training data, instead of --train-iters. May be a fraction. Rounded up to whole
    steps."""
    exit_interval: int | None = None
    """Save and exit after a step whose number is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save and exit after the first step that ends later than this many minutes."""
    seed: int = 1234
    """Seed of random weights and of the order of the data."""
    deterministic_mode: bool = field(default=False, metadata=aliases("--deterministic", "--npu-deterministic"))
    """Give the same bits each time on the same devices. Slower on GPU and NPU; a CPU always does this."""
    loss_scale: float | None = None
    """With --fp16: constant loss scale; default: a dynamic one."""
    initial_loss_scale: float = 2.0**32
    """With --fp16: first value of the dynamic loss scale."""
    min_loss_scale: float = 1.0
    """With --fp16: smallest value of the dynamic loss scale."""
    loss_scale_window: int = 1000
    """With --fp16: number of steps without overflow until the loss scale doubles."""
    hysteresis: int = 2
    """With --fp16: number of overflows until the loss scale halves."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """After a bad step: stop, or skip the step and go on. A step is bad if its loss or gradient norm is not finite, or
    its loss is 0 or a spike. A bad step never changes weights."""
    no_check_for_nan_in_loss_and_grad: bool = False
    """Megatron's name for --on-bad-step skip."""
    max_consecutive_skips: int = 10
    """With --on-bad-step skip: stop after more than this many bad steps in a row."""
    check_for_spiky_loss: bool = False
    """Treat a loss above --spiky-loss-factor times the mean of the last 100 losses as bad."""
    spiky_loss_factor: float = 2.0
    """With --check-for-spiky-loss: how far above the mean a spike is. (Megatron: 10 times the largest loss.)"""
    recompute_granularity: Literal["full"] | None = None
    """Recompute activations to save memory: full keeps only the input of each layer."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers recompute: uniform is all of them, block is the first --recompute-num-layers."""
    recompute_num_layers: int | None = None
    """With --recompute-method block: number of layers that recompute."""
    eval_interval: int = 1000
    """Steps between evaluations on the validation data."""
    eval_iters: int | Literal["full"] = 100
    """Number of global batches in one evaluation, or full for the whole set. 0 turns evaluation off."""

    @property
    def final_batch_size(self) -> int:
        """Samples of one step after the ramp-up."""
        return self.global_batch_size or self.micro_batch_size

    @property
    def length(self) -> RunLength:
        final = self.final_batch_size
        return RunLength(BatchSizes(final, *(self.rampup_batch_size or (final,))), self.train_iters, self.train_samples)

    @property
    def eval_batches(self) -> int | None:
        """Global batches of one evaluation; None for the whole set."""
        return None if self.eval_iters == "full" else self.eval_iters


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Logs. A run with --save always writes metrics.jsonl there."""

    log_interval: int = 100
    """Steps between log lines."""
    log_throughput: bool = False
    """Add TFLOP/s to the log line."""
    no_live_view: bool = False
    """Show plain log lines instead of the live view on a terminal."""
    tensorboard_dir: PathText | None = None
    """Folder for TensorBoard files, with Megatron's names of curves."""
    tensorboard_log_interval: int = 1
    """Steps between points in TensorBoard."""
    profile: bool = False
    """Profile a few steps on the first rank, with the framework's profiler."""
    profile_step_start: int = 10
    """Profile the steps after this one."""
    profile_step_end: int = 12
    """Last step that is profiled."""
    profile_save_path: PathText | None = None
    """Folder for the profiler's files; default: SAVE/profile."""
    wandb_project: str | None = None
    """Project on Weights & Biases. Without it, nothing is sent there."""
    wandb_exp_name: str | None = None
    """Name of the run on Weights & Biases; default: one that Weights & Biases chooses."""
    wandb_entity: str | None = None
    """User or team on Weights & Biases; default: the one that is logged in."""
    wandb_save_dir: PathText | None = None
    """Folder for local files of Weights & Biases; default: SAVE/wandb."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters (LoRA): trained instead of the weights when --lora-target-modules or --lora-load is given."""

    lora_target_modules: tuple[str, ...] = ()
    """Modules that get adapters: all-linear, or names such as q_proj v_proj. Megatron's names (linear_qkv linear_proj
    linear_fc1 linear_fc2) also work; modules that are fused there then share one A."""
    lora_r: int | None = None
    """Rank of the adapters; default: that of --lora-load, or 16."""
    lora_alpha: float | None = None
    """Adapters are scaled by this divided by the rank; default: that of --lora-load, or 32."""
    lora_dropout: float | None = None
    """Share of an adapter's input numbers that a training step drops; default: that of --lora-load, or 0."""
    lora_use_rslora: bool | None = None
    """Scale by alpha / sqrt(rank) instead of alpha / rank; default: as --lora-load does, or off."""
    lora_use_dora: bool | None = None
    """Also train the length of each row of the weights (DoRA); default: as --lora-load does, or off."""
    lora_load: PathText | None = None
    """Folder of adapters to go on with: PEFT's, or a run's. --load names the weights."""
    lora_ckpt_filter: bool = True
    """Save only the adapters, with the path and the hash of the weights. Otherwise checkpoints hold both."""


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """Preferences: what --stage dpo, orpo, simpo and kto minimise. Batch sizes count pairs; with kto, answers."""

    dpo_loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm"] = "sigmoid"
    """Loss of --stage dpo, under TRL's names."""
    dpo_beta: float = 0.1
    """With --stage dpo: strength of the pull to the reference."""
    dpo_label_smoothing: float = 0.0
    """With --dpo-loss-type sigmoid or robust: share of the pairs that are taken to be the wrong way round."""
    pref_ftx: float = 0.0
    """With --stage dpo: how much of the chosen answer's mean loss per token is added."""
    orpo_beta: float = 0.1
    """With --stage orpo: weight of the odds ratio, next to the chosen answer's mean loss per token."""
    simpo_beta: float = 2.5
    """With --stage simpo: scale of the mean log-probability per token."""
    gamma_beta_ratio: float = 1.4
    """With --stage simpo: the margin to reach, divided by --simpo-beta."""
    simpo_loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of --stage simpo."""
    simpo_label_smoothing: float = 0.0
    """With --simpo-loss-type sigmoid: as --dpo-label-smoothing."""
    kto_beta: float = 0.1
    """With --stage kto: strength of the pull to the reference."""
    desirable_weight: float = 1.0
    """With --stage kto: weight of desirable answers."""
    undesirable_weight: float = 1.0
    """With --stage kto: weight of other answers."""
    ref_model: PathText | None = None
    """With --stage dpo or kto: folder of the reference model; default: the weights that the run begins with."""
    refer_model_iter: int | None = None
    """With --stage dpo or kto: iteration of --ref-model; default: the newest."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints."""

    load: PathText | None = None
    """Folder of the initial weights, or of the run to resume: Hugging Face, native, Megatron torch or torch_dist."""
    ckpt_step: int | None = None
    """Iteration to load; default: the newest."""
    init: Literal["random"] | None = None
    """Start from random weights. Not together with --load."""
    save: PathText | None = None
    """Folder for checkpoints and logs of the run."""
    save_interval: int | None = None
    """Steps between saves; default: only the last step is saved, as it always is."""
    async_save: bool = False
    """Write checkpoints in the background. Training only waits until they are copied to host memory."""
    save_total_limit: int | None = field(default=None, metadata=aliases("--keep-last"))
    """How many of the newest checkpoints to keep; default: all. Older ones are removed after a new one is saved."""
    save_retain_interval: int | None = field(default=None, metadata=aliases("--keep-every"))
    """Keep checkpoints whose iteration is a multiple of this, and the newest --save-total-limit (default 1)."""
    export_hf_every: int | None = None
    """Every this many iterations, write the checkpoint also as a Hugging Face folder in SAVE/hf. Only what is
    saved is exported: give a multiple of --save-interval."""
    finetune: bool = False
    """Load only the weights: start at iteration 0 with a new optimizer."""
    no_load_optim: bool = False
    """Do not load the optimizer."""
    no_load_rng: bool = False
    """Take the seed from the settings, not from the checkpoint."""
    no_save_optim: bool = False
    """Do not save the optimizer."""
    exit_on_missing_checkpoint: bool = False
    """Accepted, without effect: a missing checkpoint always ends the run."""
    no_shared_storage: bool = False
    """Machines do not share a disk. Each saves the checkpoint parts of its ranks. Where they do share --save, this is
    recognised, and has no effect."""
    ckpt_format: Literal["native", "torch", "torch_dist"] = "native"
    """Format of saved checkpoints. Training always saves native; `tandem convert` can write torch. The format of
    --load is recognised."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """Processes. With --nproc-per-node, tandem starts them itself, with torchrun or msrun."""

    nproc_per_node: int | None = None
    """Number of processes to start on this machine. Leave it out for one process, or under torchrun or msrun."""
    nnodes: int = 1
    """Number of machines. Run the same command on each."""
    node_rank: int = 0
    """Number of this machine, from 0."""
    master_addr: str = "127.0.0.1"
    """Address of machine 0."""
    master_port: int | None = None
    """Port on machine 0; default: a free port for one machine, 29500 for several."""
    log_dir: PathText | None = None
    """Folder for the output of each process, rank_N.log; default: output is kept only if the job fails."""
    dry_run: bool = False
    """Check settings, weights, data and disk space, print what would run, and exit."""

    def refused_dry_run(self) -> Iterator[str]:
        """The problem of `--dry-run`, for commands that have nothing to check."""
        if self.dry_run:
            yield "--dry-run: nothing to check; leave it out"


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Benchmarks of lm-evaluation-harness."""

    tasks: tuple[str, ...] = ()
    """Tasks or groups of lm-evaluation-harness, or YAML files of tasks, to evaluate."""
    include_path: PathText | None = None
    """Folder with task files of your own."""
    num_fewshot: int | None = None
    """Number of solved examples before each question; default: what each task says, or 0."""
    limit: float | None = field(default=None, metadata=aliases("--max-eval-samples"))
    """Ask only this many questions of each task, or below 1 this share of them."""
    apply_chat_template: bool = field(default=False, metadata=aliases("--chat-template", "--hf-chat-template"))
    """Put each question into the model's chat template. See --enable-thinking."""
    log_samples: bool = False
    """With --output: also write every question and answer, to FILE_samples_TASK.jsonl."""
    output: PathText | None = None
    """File for the results, as JSON. Answers are kept next to it meanwhile: the same command goes on after a stop."""
    allow_code: bool = False
    """Run the code that the model writes, in tasks that need it. It can do what you can."""
    tokens_per_batch: int = 4096
    """How many tokens of questions a process computes at once."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks to ask during training: after steps that are a multiple of --eval-tasks-interval, and after the last."""
    eval_tasks_interval: int | None = None
    """Ask --eval-tasks every this many steps; default: --eval-interval."""
    task: tuple[str, ...] = ()
    """Benchmarks whose files are here, by MindSpeed-LLM's names: mmlu, ceval, cmmlu, gsm8k, boolq, bbh, agieval,
    human_eval, needlebench. Questions are put into the chat template, unless --no-chat-template is given."""
    task_data_path: tuple[PathText, ...] = ()
    """Folders with the files of --task. Each takes the last one that has some."""
    max_new_tokens: int | None = None
    """With --task: largest number of tokens in an answer; default: the task's own."""
    chain_of_thought: bool = False
    """With --task gsm8k or bbh: ask for the steps before the answer."""


GROUPS: dict[str, type] = {
    "model": ModelSettings,
    "parallel": ParallelSettings,
    "experts": ExpertSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "training": TrainingSettings,
    "lora": LoraSettings,
    "preferences": PreferenceSettings,
    "checkpoint": CheckpointSettings,
    "launch": LaunchSettings,
    "logging": LoggingSettings,
    "evaluation": TaskSettings,
}


@dataclass(frozen=True, init=False)
class Settings:
    """Everything that defines a training run.

    Give settings by name, or whole groups, or both.

    >>> Settings(lr=1e-3, train_iters=10).optimizer.lr
    0.001
    >>> Settings(optimizer=OptimizerSettings(lr=1e-3)).optimizer.lr
    0.001
    """

    model: ModelSettings
    parallel: ParallelSettings
    experts: ExpertSettings
    data: DataSettings
    optimizer: OptimizerSettings
    training: TrainingSettings
    lora: LoraSettings
    preferences: PreferenceSettings
    checkpoint: CheckpointSettings
    launch: LaunchSettings
    logging: LoggingSettings
    evaluation: TaskSettings

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            UserError: lists every unknown setting, and every value of the wrong type.
        """
        named = {name: value for name, value in values.items() if name not in GROUPS}
        groups = as_groups(Settings, named) if named else {}
        for name, group in GROUPS.items():
            given = values.get(name, group())
            object.__setattr__(self, name, dataclasses.replace(given, **groups.get(name, {})))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All settings by group and name, as plain values for YAML and JSON."""
        return {group.name: plain_values(getattr(self, group.name)) for group in dataclasses.fields(self)}


def plain_values(group: Any) -> dict[str, Any]:
    """The values of one group by name, as plain values for YAML and JSON."""
    values = dataclasses.asdict(group)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
