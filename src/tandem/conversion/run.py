"""`tandem convert` and `tandem export` as a whole: the copy, its check, and what the user is told of it."""

from __future__ import annotations

import dataclasses

from tandem.checkpoints.copy import Progress
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.prompt import PROMPT_FILE
from tandem.conversion.convert import Check, Converted, convert
from tandem.conversion.options import ConvertOptions, ExportOptions
from tandem.errors import UserError
from tandem.frameworks import installed_frameworks
from tandem.models.tensors import parameter_count

VERIFIED_PARAMETERS = 200_000_000  # models up to this size are verified unasked


def run_conversion(options: ConvertOptions, progress: Progress | None = None) -> Converted:
    """Convert; `verification` of the result says whether logits were compared, and how far they are apart.

    Raises:
        UserError: the source or the target cannot be used, or both do not compute the same; nothing is written then.
    """
    told: list[str] = []
    result = convert(options, progress, _check(options, told), _as_trained)
    return dataclasses.replace(result, verification="\n".join(told))


def run_export(options: ExportOptions, progress: Progress | None = None) -> Converted:
    """The same for `tandem export`."""
    from tandem.conversion.as_trained import export  # templates and tokenizers take a third of the time to start

    told: list[str] = []
    result = export(options, progress, _check(options, told))
    return dataclasses.replace(result, verification="\n".join(told))


def _check(options: ConvertOptions | ExportOptions, told: list[str]) -> Check | None:
    """The check of logits that the options ask for, which says in `told` what it did; None when they forbid it.

    Raises:
        UserError: it is asked for, and no framework is installed.
    """
    if options.no_verify:
        return None
    frameworks = [framework.name for framework in installed_frameworks()]
    if options.ai_framework:
        frameworks = [options.ai_framework]
    if options.verify and not frameworks:
        raise UserError("--verify needs torch or mindspore, and neither is installed")

    def check(source: TensorSource, result: TensorSource) -> None:
        size = parameter_count(source.config)
        if not options.verify and (size > VERIFIED_PARAMETERS or not frameworks):
            reason = f"{size:,} parameters" if frameworks else "neither torch nor mindspore is installed"
            told.append(f"logits not compared ({reason}); --verify compares them")
            return
        from tandem.conversion.verify import verify  # engines are imported where they are needed

        comparison = verify(source, result, frameworks[0], independent=options.verify)
        told.append(f"verified with {comparison.describe_readers()}: {comparison}")

    return check


def _as_trained(source: TensorSource, companions: Companions) -> tuple[Companions, list[str]]:
    if source.document(PROMPT_FILE) is None:
        return companions, []
    from tandem.conversion.as_trained import as_trained

    return as_trained(source, companions)
