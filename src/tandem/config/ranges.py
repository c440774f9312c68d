"""Which numbers a setting may be. Others are refused by name, before they become a wrong run or a traceback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tandem.errors import UserError

# fmt: off
# Whole numbers of something that must be there.
ONE_OR_MORE = {
    "max_position_embeddings", "padded_vocab_size", "make_vocab_size_divisible_by",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "context_parallel_size", "distributed_timeout_minutes", "nproc_per_node", "nnodes", "workers", "seq_length",
    "micro_batch_size", "global_batch_size", "train_iters", "train_samples",
    "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
    "loss_scale_window", "hysteresis", "max_consecutive_skips", "log_interval", "tensorboard_log_interval",
    "save_interval", "save_total_limit", "save_retain_interval", "export_hf_every",
}
# fmt: on
ABOVE_ZERO = {"epochs", "loss_scale", "initial_loss_scale", "min_loss_scale"}
BELOW_ONE = {"adam_beta1", "adam_beta2", "lr_warmup_fraction"}  # and not below 0
LARGEST = {"seed": 2**32 - 1, "master_port": 65535}  # NumPy's and TCP's


def check_ranges(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for the first number that no run can use; `settings` are groups of plain values by name.

    Every other number is at least 0, and all of them are finite.
    """
    for values in settings.values():
        for name, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            for number in numbers:
                if isinstance(number, int | float) and (expected := _expected(name, number)):
                    raise UserError(f"--{name.replace('_', '-')} {number}: expected {expected}")


def _expected(name: str, number: float) -> str | None:
    """What should stand there; None when all is well."""
    if name in ONE_OR_MORE and number < 1:
        return "1 or more"
    if name in ABOVE_ZERO and not 0 < number < math.inf:
        return "a positive number"
    if name in BELOW_ONE and not 0 <= number < 1:
        return "a number from 0 to below 1"
    if not 0 <= number < math.inf:
        return "0 or more"
    largest = LARGEST.get(name, math.inf)
    return None if number <= largest else f"{largest} or less"
