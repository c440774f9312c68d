"""`tandem quickstart`: the whole job on a toy model."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.quickstart.run import QuickstartOptions, quickstart

DESCRIPTION = (
    "Run the whole job offline in a few minutes: write a small instruction set and corpus, make a toy Qwen3, convert, "
    "preprocess, pretrain, fine-tune, export, and ask held-out questions before and after."
)


def run(argv: Sequence[str]) -> None:
    quickstart(parse(QuickstartOptions, "quickstart", DESCRIPTION, argv))
