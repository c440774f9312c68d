"""`tandem rerun`: run a recorded training again."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.config.sources import parse_dataclass
from tandem.errors import UserError
from tandem.training.rerun import RerunOptions, rerun

DESCRIPTION = (
    "tandem rerun RUN_DIR [OPTIONS]: train again as run.json in a --save folder tells, and compare every loss with "
    "metrics.jsonl there."
)


def run(argv: Sequence[str]) -> None:
    words = list(argv)
    folder = words.pop(0) if words and not words[0].startswith("-") else None
    options = parse_dataclass(RerunOptions, "rerun", DESCRIPTION, words)
    if folder is None:
        raise UserError("which run? Give its --save folder first: tandem rerun RUN_DIR")
    result = rerun(folder, options)
    if result.steps:
        off = f"at most {result.difference:.3g} off, at iteration {result.worst}" if result.difference else "identical"
        print(f"losses of {result.steps} steps: {off}")
