"""`tandem convert`: weights between Hugging Face and Megatron-core layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.native.source import prompt_text
from tandem.cli.progress import byte_progress
from tandem.config.parsing import parse_dataclass
from tandem.config.upstream.flags import CONVERT_IGNORED, split_ignored
from tandem.conversion.convert import Check, Converted, convert
from tandem.conversion.options import ConvertOptions
from tandem.errors import UserError
from tandem.models.tensors import parameter_count

if TYPE_CHECKING:
    from tandem.conversion.as_trained import ExportOptions

DESCRIPTION = (
    "Convert weights: Hugging Face -> Megatron-core layout for any TP and PP, back, and from one layout to another. "
    "The training commands load any layout, so one conversion serves all of them."
)
VERIFIED_PARAMETERS = 200_000_000  # models up to this size are verified unasked


def run(argv: Sequence[str]) -> None:
    rest, notices = split_ignored(argv, CONVERT_IGNORED)
    options = parse_dataclass(ConvertOptions, "convert", DESCRIPTION, rest)
    if idle := options.without_effect():
        notices.append(f"accepted, without effect for this target: {' '.join(idle)}")
    for notice in notices:
        print(f"> {notice}")
    with byte_progress("converting") as progress:
        result = convert(options, progress, verification(options), _as_trained)
    print_result(result)


def verification(options: ConvertOptions | ExportOptions) -> Check | None:
    """The check of logits that the options ask for; None when they forbid it.

    Raises:
        UserError: it is asked for and forbidden, or no framework is installed.
    """
    if options.verify and options.no_verify:
        raise UserError("--verify and --no-verify exclude each other")
    if options.no_verify:
        return None
    # Imported where they are needed: engines, templates and tokenizers take a third of the time to start.
    from tandem.conversion.verify import verify
    from tandem.frameworks import installed_frameworks

    frameworks = (
        [options.ai_framework] if options.ai_framework else [framework.name for framework in installed_frameworks()]
    )
    if options.verify and not frameworks:
        raise UserError("--verify needs torch or mindspore, and neither is installed")

    def check(source: TensorSource, result: TensorSource) -> None:
        size = parameter_count(source.config)
        if not options.verify and (size > VERIFIED_PARAMETERS or not frameworks):
            reason = f"{size:,} parameters" if frameworks else "neither torch nor mindspore is installed"
            print(f"logits not compared ({reason}); --verify compares them", flush=True)
            return
        found = verify(source, result, frameworks[0], independent=options.verify)
        print(f"verified with {found.describe_readers()}: {found}", flush=True)

    return check


def _as_trained(source: TensorSource, companions: Companions) -> tuple[Companions, list[str]]:
    if prompt_text(source) is None:
        return companions, []
    from tandem.conversion.as_trained import as_trained

    return as_trained(source, companions)


def print_result(result: Converted) -> None:
    for notice in result.notices:
        print(f"> {notice}")
    print(f"{result.tensors} tensors, {result.parameters:,} parameters")
    if result.iteration is None:
        print(f"saved Hugging Face model to {result.folder}")
    else:
        print(f"  successfully saved checkpoint from iteration {result.iteration:7d} to {result.folder}")
    print("Done!")
