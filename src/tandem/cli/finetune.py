"""`tandem finetune`: train on instruction data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tandem.cli.processes import run_training
from tandem.cli.settings import parse_settings

DESCRIPTION = (
    "Train on instruction data made by `tandem preprocess`. The loss counts only the answers. "
    "--config FILE.yaml reads settings from a file; flags override the file. "
    "--no-x turns the switch --x off."
)
FIRST = (
    *("load", "save", "data_path", "tokenizer_name_or_path", "seq_length", "micro_batch_size", "global_batch_size"),
    *("train_iters", "epochs", "lr", "save_interval", "save_total_limit", "ai_framework", "nproc_per_node", "bf16"),
    *("prompt_type", "pack", "stage", "finetune", "lora_target_modules", "lora_r", "lora_alpha", "lora_load"),
)


def run(argv: Sequence[str]) -> int:
    settings, notices = parse_settings("finetune", DESCRIPTION, argv, first=FIRST, positionals={"load": "MODEL"})
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, is_instruction_dataset=True))
    return run_training("finetune", argv, settings, notices)
