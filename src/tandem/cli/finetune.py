"""`tandem finetune`: train on instruction data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tandem.cli.processes import run_training
from tandem.config.parsing import parse_settings

DESCRIPTION = (
    "Train on instruction data made by `tandem preprocess`; only answers are trained. "
    "--config FILE.yaml gives settings; flags override it."
)


def run(argv: Sequence[str]) -> int:
    settings, notices = parse_settings("finetune", DESCRIPTION, argv)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, is_instruction_dataset=True))
    return run_training("finetune", argv, settings, notices)
