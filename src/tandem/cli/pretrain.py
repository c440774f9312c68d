"""`tandem pretrain`: train on text."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.processes import run_training
from tandem.cli.settings import parse_settings
from tandem.errors import UserError

DESCRIPTION = (
    "Train on text data made by `tandem preprocess`. "
    "--config FILE.yaml reads settings from a file; flags override the file. "
    "--no-x turns the switch --x off."
)
FIRST = (
    *("load", "save", "data_path", "tokenizer_name_or_path", "seq_length", "micro_batch_size", "global_batch_size"),
    *("train_iters", "lr", "save_interval", "ai_framework", "nproc_per_node", "bf16"),
)


def run(argv: Sequence[str]) -> int:
    settings, notices = parse_settings("pretrain", DESCRIPTION, argv, first=FIRST, positionals={"load": "MODEL"})
    if settings.data.is_instruction_dataset or settings.data.stage:
        raise UserError("--is-instruction-dataset and --stage belong to `tandem finetune`")
    return run_training("pretrain", argv, settings, notices)
