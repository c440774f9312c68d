"""`tandem export`: a trained checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.convert import print_result, verification
from tandem.cli.progress import byte_progress
from tandem.config.parsing import parse_dataclass
from tandem.conversion.as_trained import ExportOptions, export

DESCRIPTION = "Write any checkpoint, of any layout, as a Hugging Face folder that AutoModelForCausalLM loads."


def run(argv: Sequence[str]) -> None:
    options = parse_dataclass(ExportOptions, "export", DESCRIPTION, argv)
    with byte_progress("exporting") as progress:
        result = export(options, progress, verification(options))
    print_result(result)
