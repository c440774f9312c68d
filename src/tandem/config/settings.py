"""The settings of a training run, in groups. Every field is a flag under its Megatron name, and a YAML key.

A field's docstring is its help text. `None` means "not given": the model's values then come from `config.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from tandem.config.batch_size import BatchSizes
from tandem.config.ranges import check_ranges
from tandem.errors import UserError
from tandem.parallel.grid import Grid
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
    hf_cfg_dir: str | None = None
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


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data."""

    data_path: tuple[str, ...] = ()
    """Prefix of the preprocessed files: PREFIX.bin/.idx for pretraining, PREFIX_packed_*_document for instructions.
    Several are blended by their sizes, or by weights: WEIGHT PREFIX WEIGHT PREFIX. Raw files (.jsonl, .parquet, ...),
    folders and patterns are preprocessed first, and found in a cache the next time."""
    data_cache_path: str | None = None
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
    valid_data_path: tuple[str, ...] = ()
    """Validation sets in place of the split's: NAME=PREFIX ..., reported separately, or one PREFIX alone. Raw
    files will do, too."""
    split: str = "969,30,1"
    """Proportions of train, validation and test."""
    seq_length: int = 4096
    """Tokens of a sample."""
    tokenizer_type: str = "PretrainedFromHF"
    """Only PretrainedFromHF."""
    tokenizer_name_or_path: str | None = None
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

    ai_framework: str = "torch"
    """Backend: mindspore, or torch (also: pytorch)."""
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
    deterministic_mode: Annotated[bool, tyro.conf.arg(aliases=("--deterministic", "--npu-deterministic"))] = False
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


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Logs, beside the metrics.jsonl that --save keeps."""

    log_interval: int = 100
    """Steps between log lines."""
    log_throughput: bool = False
    """Add TFLOP/s to the log line."""
    no_live_view: bool = False
    """Plain lines only, on a terminal, too."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard's files, under Megatron's tags."""
    tensorboard_log_interval: int = 1
    """Steps between TensorBoard's points."""
    profile: bool = False
    """Run the framework's profiler over some steps, on the first rank."""
    profile_step_start: int = 10
    """Iteration after which profiling begins."""
    profile_step_end: int = 12
    """Last iteration that is profiled."""
    profile_save_path: str | None = None
    """Folder for the profiler's files; default: profile in --save."""
    wandb_project: str | None = None
    """Project on Weights & Biases; without it nothing is sent there."""
    wandb_exp_name: str | None = None
    """Name of the run there; default: theirs."""
    wandb_entity: str | None = None
    """User or team there; default: the one that is logged in."""
    wandb_save_dir: str | None = None
    """Folder for its local files; default: wandb in --save."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints."""

    load: str | None = None
    """Folder of the initial weights or of the run to resume: Hugging Face, native, or Megatron torch."""
    ckpt_step: int | None = None
    """Iteration to load; default: the newest."""
    init: Literal["random"] | None = None
    """Start from random weights; excludes --load."""
    save: str | None = None
    """Folder for checkpoints."""
    save_interval: int | None = None
    """Steps between saves; the last step is always saved."""
    async_save: bool = False
    """Training waits for a copy in host memory only; a thread writes it to the disk."""
    save_total_limit: Annotated[int | None, tyro.conf.arg(aliases=("--keep-last",))] = None
    """Keep the newest so many checkpoints, and remove older ones once a new one is on the disk; default: all."""
    save_retain_interval: Annotated[int | None, tyro.conf.arg(aliases=("--keep-every",))] = None
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
    log_dir: str | None = None
    """Folder for each started process's output, rank_N.log; default: it is kept only when the job fails."""
    dry_run: bool = False
    """Check settings, weights, data and disk for so many processes, say what would run, and leave."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that defines a training run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Groups of plain values, as YAML and JSON hold them."""
        return {
            group: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for group, values in dataclasses.asdict(self).items()
        }

    @property
    def layout(self) -> Layout:
        parallel = self.parallel
        return Layout(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=parallel.num_layers_per_virtual_pipeline_stage,
            num_layer_list=parse_layers("--num-layer-list", parallel.num_layer_list),
            noop_layers=parse_layers("--noop-layers", parallel.noop_layers) or (),
        )

    @property
    def global_batch_size(self) -> int:
        return self.training.global_batch_size or self.training.micro_batch_size

    @property
    def batch_sizes(self) -> BatchSizes:
        final = self.global_batch_size
        return BatchSizes(final, *(self.training.rampup_batch_size or (final,)))

    @property
    def total_iters(self) -> int:
        """Steps of the whole run."""
        if self.training.train_iters is not None:
            return self.training.train_iters
        assert self.training.train_samples is not None
        return self.batch_sizes.iterations(self.training.train_samples)[0]

    @property
    def total_samples(self) -> int:
        """Samples that the whole run consumes."""
        if self.training.train_iters is not None:
            return self.training.train_iters * self.global_batch_size
        assert self.training.train_samples is not None
        return self.batch_sizes.iterations(self.training.train_samples)[1]

    def iters_from(self, iteration: int, consumed_samples: int) -> int:
        """Steps of the whole run when it goes on from there, perhaps with another batch size."""
        if self.training.train_iters is not None:
            return self.training.train_iters
        assert self.training.train_samples is not None
        return iteration + self.batch_sizes.iterations(self.training.train_samples, consumed_samples)[0]

    def samples_from(self, iteration: int, consumed_samples: int) -> int:
        """Samples that the whole run consumes then."""
        left = max(0, self.iters_from(iteration, consumed_samples) - iteration)
        return self.batch_sizes.consumed_after(left, consumed_samples)

    def check(self) -> None:
        """Raise UserError where settings are missing, out of range, or contradict each other."""
        check_ranges(self.to_dict())
        training, optimizer, checkpoint = self.training, self.optimizer, self.checkpoint
        lengths = {"--train-iters": training.train_iters, "--train-samples": training.train_samples}
        given = [f"{name} {value}" for name, value in (lengths | {"--epochs": training.epochs}).items() if value]
        if not given:
            raise UserError("--train-iters is required, or --train-samples or --epochs")
        if len(given) > 1 and training.epochs:
            raise UserError(f"{' and '.join(given)} exclude each other: give one")
        if optimizer.lr is None:
            raise UserError("--lr is required")
        if not self.data.data_path:
            raise UserError("--data-path is required: the prefix that `tandem preprocess` wrote")
        if (checkpoint.load is None) == (checkpoint.init is None):
            raise UserError(
                "give either --load FOLDER with initial weights, or --init random to start from random ones"
            )
        if optimizer.min_lr > optimizer.lr:
            raise UserError(f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}")
        if optimizer.lr_warmup_fraction is not None and (optimizer.lr_warmup_iters or optimizer.lr_warmup_samples):
            raise UserError(
                "--lr-warmup-fraction and --lr-warmup-iters or --lr-warmup-samples exclude each other: give one"
            )
        self._check_profile()
        self._check_unit_of_length()
        self._check_saving()
        self._check_bad_steps()
        self._check_loss_scale()
        self._check_batch_size()
        self._check_weight_decay()
        self.check_implemented()
        self._check_recompute()
        if not training.epochs and not self.total_iters:
            raise UserError(
                f"--train-samples {training.train_samples} are fewer than one step takes, "
                f"{self.batch_sizes.at(0)}: give more, or a smaller --global-batch-size"
            )

    def _check_profile(self) -> None:
        logging = self.logging
        if not logging.profile:
            return
        if not 0 <= logging.profile_step_start < logging.profile_step_end:
            raise UserError(
                f"--profile-step-start {logging.profile_step_start} and --profile-step-end "
                f"{logging.profile_step_end}: expected 0 <= start < end"
            )
        if logging.profile_save_path is None and self.checkpoint.save is None:
            raise UserError("--profile needs --save or --profile-save-path, a folder for its files")

    def _check_saving(self) -> None:
        checkpoint = self.checkpoint
        if checkpoint.export_hf_every and checkpoint.no_shared_storage:
            raise UserError(
                "--export-hf-every needs the whole checkpoint on one disk, and --no-shared-storage spreads it: bring "
                "the folders together and use `tandem export`"
            )

    def _check_bad_steps(self) -> None:
        if self.training.spiky_loss_factor <= 1:
            raise UserError(f"--spiky-loss-factor {self.training.spiky_loss_factor}: expected more than 1")

    def _check_loss_scale(self) -> None:
        training = self.training
        if training.fp16 and training.bf16:
            raise UserError("--fp16 and --bf16 exclude each other: give one")

    def _check_unit_of_length(self) -> None:
        """As in Megatron, a run is counted in iterations or in samples, with every length in the same unit; epochs
        become iterations."""
        training, optimizer = self.training, self.optimizer
        by_iterations = {
            "--train-iters": training.train_iters,
            "--lr-decay-iters": optimizer.lr_decay_iters,
            "--lr-wsd-decay-iters": optimizer.lr_wsd_decay_iters,
            "--lr-warmup-iters": optimizer.lr_warmup_iters or None,
        }
        by_samples = {
            "--train-samples": training.train_samples,
            "--lr-decay-samples": optimizer.lr_decay_samples,
            "--lr-wsd-decay-samples": optimizer.lr_wsd_decay_samples,
            "--lr-warmup-samples": optimizer.lr_warmup_samples or None,
            "--rampup-batch-size": training.rampup_batch_size,
        }
        by_epochs = training.epochs is not None
        by_steps = by_epochs or training.train_iters is not None
        wrong, unit = (by_samples, "iters") if by_steps else (by_iterations, "samples")
        if given := [flag for flag, value in wrong.items() if value is not None]:
            counted = "--epochs" if by_epochs else f"--train-{unit}"
            raise UserError(f"{' '.join(given)}: a run counted with {counted} takes no such length")
        wsd = optimizer.lr_wsd_decay_iters if unit == "iters" else optimizer.lr_wsd_decay_samples
        if optimizer.lr_decay_style == "WSD" and wsd is None:
            raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}")

    def _check_batch_size(self) -> None:
        micro, final = self.training.micro_batch_size, self.global_batch_size
        if final % micro:
            raise UserError(f"--global-batch-size {final} is not a multiple of --micro-batch-size {micro}")
        if self.training.rampup_batch_size is None:
            return
        start, increment, samples = self.training.rampup_batch_size
        if not 0 < start <= final or increment <= 0 or samples < 0 or (final - start) % increment:
            raise UserError(
                f"--rampup-batch-size {start} {increment} {samples}: whole increments must lead from the first size "
                f"to --global-batch-size {final}"
            )
        if start % micro or increment % micro:
            raise UserError(f"--rampup-batch-size {start} {increment}: not multiples of --micro-batch-size {micro}")

    def check_grid(self, grid: Grid) -> None:
        """Raise UserError when the batch sizes do not divide over the data ranks of `grid`."""
        whole = self.training.micro_batch_size * grid.data_size
        sizes: dict[str, tuple[int, ...]] = {"--global-batch-size": (self.global_batch_size,)}
        if self.training.rampup_batch_size is not None:
            sizes["--rampup-batch-size"] = self.training.rampup_batch_size[:2]
        for flag, values in sizes.items():
            if any(value % whole for value in values):
                raise UserError(
                    f"{flag} {' '.join(map(str, values))}: expected multiples of --micro-batch-size "
                    f"{self.training.micro_batch_size} x {grid.data_size} data-parallel ranks = {whole}"
                )

    def _check_weight_decay(self) -> None:
        optimizer = self.optimizer
        ends = (optimizer.start_weight_decay, optimizer.end_weight_decay)
        if optimizer.weight_decay_incr_style == "constant":
            if ends != (None, None):
                raise UserError("--start-weight-decay and --end-weight-decay need --weight-decay-incr-style")
        elif None in ends or not 0 <= ends[0] <= ends[1]:  # type: ignore[operator]
            raise UserError(
                f"--weight-decay-incr-style {optimizer.weight_decay_incr_style} needs --start-weight-decay and an "
                f"--end-weight-decay that is not smaller; given {ends[0]} and {ends[1]}"
            )

    def check_implemented(self) -> None:
        """Raise UserError for what would change the computation and is not there."""
        for name in ("attention_dropout", "hidden_dropout"):
            if getattr(self.model, name):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self.model, name)} is not supported; only 0 is")
        if self.parallel.context_parallel_size != 1:
            raise UserError(f"--context-parallel-size {self.parallel.context_parallel_size}: only 1 is supported")
        if self.data.tokenizer_type != "PretrainedFromHF":
            raise UserError(f"--tokenizer-type {self.data.tokenizer_type}: only PretrainedFromHF is supported")

    def _check_recompute(self) -> None:
        training = self.training
        if training.recompute_method == "block" and training.recompute_num_layers is None:
            raise UserError("--recompute-method block needs --recompute-num-layers")
        if training.recompute_granularity == "full" and training.recompute_method is None:
            raise UserError("--recompute-granularity full needs --recompute-method uniform or block")
