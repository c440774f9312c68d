"""`tandem finetune`: train on instruction data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tandem.config.sources import parse_settings
from tandem.training.run import train

DESCRIPTION = (
    "Train on instruction data made by `tandem preprocess`; only answers are trained. "
    "--config FILE.yaml gives settings; flags override it."
)


def run(argv: Sequence[str]) -> None:
    settings, notices = parse_settings("finetune", DESCRIPTION, argv)
    for notice in notices:
        print(f"> {notice}")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, is_instruction_dataset=True))
    train(settings)
