"""`tandem convert`: weights between Hugging Face and Megatron-core layouts."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.checkpoints.convert import Converted, ConvertOptions, convert
from tandem.cli.progress import byte_progress
from tandem.config.sources import parse_dataclass
from tandem.config.upstream import CONVERT_IGNORED, split_ignored

DESCRIPTION = (
    "Convert weights: Hugging Face -> Megatron-core layout for any TP and PP, back, and from one layout to another. "
    "The training commands load any layout, so one conversion serves all of them."
)


def run(argv: Sequence[str]) -> None:
    rest, notices = split_ignored(argv, CONVERT_IGNORED)
    options = parse_dataclass(ConvertOptions, "convert", DESCRIPTION, rest)
    for notice in notices:
        print(f"> {notice}")
    with byte_progress("converting") as progress:
        result = convert(options, progress)
    print_result(result)


def print_result(result: Converted) -> None:
    print(f"{result.tensors} tensors, {result.parameters:,} parameters")
    if result.iteration is None:
        print(f"saved Hugging Face model to {result.folder}")
    else:
        print(f"  successfully saved checkpoint from iteration {result.iteration:7d} to {result.folder}")
    print("Done!")
