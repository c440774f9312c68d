"""Comparing an exported folder with its certificate: transformers reads and computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tandem.backends import read_folder
from tandem.conversion.certificate.compare import (
    CONFIG,
    NO_STATED_END,
    Difference,
    of_config,
    of_end_ids,
    of_numbers,
    of_prompts,
    of_tensors,
)
from tandem.conversion.certificate.content import Certificate, Computed, log_probabilities
from tandem.conversion.certificate.result import Verified
from tandem.errors import UserError
from tandem.frameworks import has_transformers
from tandem.models.hf_config import from_hf, hf_dtype, load_hf_config


def verify_folder(folder: Path, certificate: Certificate, tolerance: float) -> Verified:
    """Compare tokens, end tokens and log-probabilities.

    Raises:
        UserError: transformers is not installed, or cannot open the folder.
    """
    if not has_transformers():
        raise UserError("tandem verify FOLDER needs transformers and torch: pip install transformers torch")
    probes, hf = certificate.probes, load_hf_config(folder)
    sequences = [probe.token_ids for probe in probes]
    fits = max(map(max, sequences)) < int(hf.get("vocab_size") or 0)
    reading = read_folder(folder, [probe.messages or probe.text for probe in probes], sequences if fits else [])
    differences = [
        *of_prompts(probes, reading.prompts),
        *of_end_ids(certificate, reading.end_ids, str(folder)),
    ]
    asks = any(probe.messages for probe in probes)
    skipped = (NO_STATED_END,) if asks and not certificate.end_ids and not reading.end_ids else ()
    if not fits:
        differences += _facts(certificate, hf, reading.missing, reading.unexpected)
        return Verified(str(folder), reading.reader, certificate, tuple(differences), not_compared=skipped)
    pairs = zip(reading.logits, probes, strict=True)
    found = Computed(tuple(log_probabilities(logits, probe) for logits, probe in pairs))
    numbers = of_numbers(certificate, found, tolerance, hf_dtype(hf))
    if numbers.difference is not None:
        differences += _facts(certificate, hf, reading.missing, reading.unexpected) or [numbers.difference]
    return Verified(str(folder), reading.reader, certificate, tuple(differences), numbers, skipped)


def _facts(
    certificate: Certificate, hf: dict[str, Any], missing: tuple[str, ...], unexpected: tuple[str, ...]
) -> list[Difference]:
    """What the files say that explains other numbers."""
    try:
        config = of_config(certificate.config, from_hf(hf))
    except UserError as error:
        config = [Difference(CONFIG, str(error))]
    return [*of_tensors(missing, unexpected), *config]
