"""What other tools call an option, so that an unknown name is answered with the one that does the same here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from tandem.errors import nearest

_WEIGHTS = ("load", "load_dir", "model")
_RESULT = ("save", "save_dir", "output_prefix", "work_dir", "output")
_DATA = ("data_path", "input")
_LENGTH = ("seq_length", "max_new_tokens")
_BATCH = ("micro_batch_size",)
_TOKENIZER = ("tokenizer_name_or_path",)
_PROCESSES = ("nproc_per_node", "devices")
_TENSOR = ("tensor_model_parallel_size", "target_tensor_parallel_size")
_PIPELINE = ("pipeline_model_parallel_size", "target_pipeline_parallel_size")
_FRAMEWORK = ("ai_framework", "backend")

# Name elsewhere -> names here. The first one that a command has is suggested.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("model", "model_name_or_path", "model_path", "model_name", "checkpoint", "ckpt"), _WEIGHTS),
        **dict.fromkeys(("resume", "resume_from_checkpoint", "pretrained_checkpoint", "folder"), _WEIGHTS),
        **dict.fromkeys(("out", "output", "output_dir", "out_dir", "save_path", "save_folder", "export_dir"), _RESULT),
        **dict.fromkeys(("data", "dataset", "datasets", "data_dir", "train_file", "train_data", "file"), _DATA),
        **dict.fromkeys(("valid_data", "validation_file", "eval_dataset", "eval_data"), ("valid_data_path",)),
        **dict.fromkeys(
            ("max_length", "max_seq_length", "max_seq_len", "seq_len", "cutoff_len", "block_size"), _LENGTH
        ),
        **dict.fromkeys(("max_tokens", "max_new_token"), ("max_new_tokens",)),
        **dict.fromkeys(("batch_size", "per_device_train_batch_size", "train_batch_size", "mbs"), _BATCH),
        **dict.fromkeys(("gbs",), ("global_batch_size",)),
        **dict.fromkeys(("learning_rate",), ("lr",)),
        **dict.fromkeys(("min_learning_rate",), ("min_lr",)),
        **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("lr_decay_style",)),
        **dict.fromkeys(("warmup_ratio", "warmup_fraction"), ("lr_warmup_fraction",)),
        **dict.fromkeys(("warmup_steps", "warmup_iters"), ("lr_warmup_iters",)),
        **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), ("epochs",)),
        **dict.fromkeys(("max_steps", "num_steps", "steps", "iters", "num_iters"), ("train_iters",)),
        **dict.fromkeys(("max_grad_norm", "grad_clip", "gradient_clipping"), ("clip_grad",)),
        **dict.fromkeys(("logging_steps", "log_every", "log_freq"), ("log_interval",)),
        **dict.fromkeys(("save_steps", "save_every", "checkpoint_interval"), ("save_interval",)),
        **dict.fromkeys(("eval_steps", "eval_every"), ("eval_interval",)),
        **dict.fromkeys(("gradient_checkpointing", "recompute"), ("recompute_granularity", "recompute_num_layers")),
        **dict.fromkeys(("tokenizer", "tokenizer_path", "tokenizer_model", "tokenizer_dir"), _TOKENIZER),
        **dict.fromkeys(("template", "chat_template", "conversation_template"), ("prompt_type",)),
        **dict.fromkeys(("packing",), ("pack",)),
        **dict.fromkeys(("num_proc", "num_workers", "preprocessing_num_workers"), ("workers",)),
        **dict.fromkeys(("question", "text", "message", "ask"), ("prompt",)),
        **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "nproc", "num_processes"), _PROCESSES),
        **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), _TENSOR),
        **dict.fromkeys(("pp", "pp_size", "pipeline_parallel_size"), _PIPELINE),
        **dict.fromkeys(("framework", "backend"), _FRAMEWORK),
        **dict.fromkeys(("loss_type", "pref_loss"), ("dpo_loss_type",)),
        **dict.fromkeys(("label_smoothing",), ("dpo_label_smoothing",)),
        **dict.fromkeys(("kto_chosen_weight",), ("desirable_weight",)),
        **dict.fromkeys(("kto_rejected_weight",), ("undesirable_weight",)),
        **dict.fromkeys(("ref_model_name_or_path", "reference_model"), ("ref_model",)),
        **dict.fromkeys(("dtype", "torch_dtype", "precision"), ("params_dtype", "bf16")),
    }
)

_ACCUMULATION = "global_batch_size", "which is micro-batch size x accumulation x data-parallel processes"
_BETA = "dpo_beta", "or that of another stage: orpo, simpo and kto have their own"
# Name elsewhere -> the option here, and how its value is another one.
OTHER_VALUES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), _ACCUMULATION),
        **dict.fromkeys(("beta", "pref_beta"), _BETA),
        "simpo_gamma": ("gamma_beta_ratio", "which is simpo_gamma / beta"),
    }
)


def suggestion(name: str, valid: Collection[str]) -> str:
    """`"; did you mean 'lr'?"`: the option that does what `name` does in another tool, or the closest name.

    An empty string when there is neither. Flags are answered with flags.

    >>> suggestion("--learning-rate", ["--lr", "--min-lr"])
    "; did you mean '--lr'?"
    """
    elsewhere = name.removeprefix("--").replace("-", "_").lower()
    option, value = OTHER_VALUES.get(elsewhere, ("", ""))
    for known in (option, *OTHER_NAMES.get(elsewhere, ())):
        spelled = f"--{known.replace('_', '-')}" if name.startswith("--") else known
        if spelled in valid:
            return f"; did you mean {spelled!r}{', ' * bool(value)}{value}?"
    return nearest(name, list(valid))
