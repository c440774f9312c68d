"""`tandem export`: write a trained checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.cli.convert import print_result
from tandem.cli.progress import byte_progress
from tandem.conversion.options import ExportOptions
from tandem.conversion.run import run_export

DESCRIPTION = "Write a checkpoint of any layout as a Hugging Face folder. AutoModelForCausalLM can load it."


def run(argv: Sequence[str]) -> None:
    options = parse(ExportOptions, "export", DESCRIPTION, argv)
    with byte_progress("exporting") as progress:
        result = run_export(options, progress)
    print_result(result)
