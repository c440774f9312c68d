"""`tandem convert` and `tandem export` as a whole: the copy, its check, and a report of the check."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.checkpoints.copy import Progress
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.prompt import PROMPT_FILE
from tandem.conversion.convert import Check, Converted, convert
from tandem.conversion.options import ConvertOptions, ExportOptions
from tandem.errors import UserError
from tandem.frameworks import installed_frameworks
from tandem.models.tensors import parameter_count

if TYPE_CHECKING:
    from tandem.conversion.as_trained import Certify

VERIFIED_PARAMETERS = 200_000_000  # models up to this size are verified unasked


def run_conversion(options: ConvertOptions, progress: Progress | None = None) -> Converted:
    """Convert. `verification` of the result says whether logits were compared, and how much they differ.

    Raises:
        UserError: the source or the target cannot be used, or they do not compute the same. Then nothing is written.
    """
    verification: list[str] = []
    result = convert(options, progress, _check(options, verification), _as_trained)
    return dataclasses.replace(result, verification="\n".join(verification))


def run_export(options: ExportOptions, progress: Progress | None = None) -> Converted:
    """The same for `tandem export`."""
    from tandem.conversion.as_trained import export  # templates and tokenizers take a third of the time to start

    verification: list[str] = []
    certified: list[str] = []
    result = export(options, progress, _check(options, verification), _certify(options, certified))
    said = [*verification, *filter(None, [result.verification]), *certified]
    return dataclasses.replace(result, verification="\n".join(said))


def _certify(options: ExportOptions, said: list[str]) -> Certify | None:
    """What writes the certificate; None with `--no-certificate`. It adds what it did to `said`.

    Faults of small models are computed, too: each needs the model once more.
    """
    if options.no_certificate:
        return None

    def certify(work: Path, trained: TensorSource, written: TensorSource, companions: Companions) -> list[str]:
        from tandem.conversion.certificate.exporting import add_certificate  # engines are imported where needed

        done, notices = add_certificate(
            work,
            trained,
            written,
            companions,
            options.ai_framework,
            dtype=options.gguf,
            with_faults=options.verify or parameter_count(written.config) <= VERIFIED_PARAMETERS,
        )
        said.extend([done] if done else [])
        return notices

    return certify


def _check(options: ConvertOptions | ExportOptions, verification: list[str]) -> Check | None:
    """The check of logits that the options ask for; None with `--no-verify`. It adds what it did to `verification`.

    Raises:
        UserError: `--verify` is given, and no framework is installed.
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
            verification.append(f"logits not compared ({reason}); --verify compares them")
            return
        from tandem.conversion.verify import verify  # engines are imported where they are needed

        comparison = verify(source, result, frameworks[0])
        verification.append(f"verified with {comparison.describe_readers()}: {comparison}")

    return check


def _as_trained(source: TensorSource, companions: Companions) -> tuple[Companions, list[str]]:
    if source.document(PROMPT_FILE) is None:
        return companions, []
    from tandem.conversion.as_trained import as_trained

    return as_trained(source, companions)
