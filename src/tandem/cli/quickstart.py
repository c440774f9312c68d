"""`tandem quickstart`: all steps on a toy model."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.quickstart.run import QuickstartOptions, quickstart

DESCRIPTION = (
    "Try everything offline in a few minutes. Makes a small corpus, small instruction data and a toy Qwen3 model. Then "
    "converts, preprocesses, pretrains, fine-tunes and exports. Asks held-out questions before and after."
)


def run(argv: Sequence[str]) -> None:
    quickstart(parse(QuickstartOptions, "quickstart", DESCRIPTION, argv))
