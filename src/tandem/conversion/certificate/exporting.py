"""The certificate's part in an export."""

from __future__ import annotations

from pathlib import Path

from tandem.checkpoints.hf.companions import CONFIG, companion_json
from tandem.checkpoints.hf.record import CERTIFICATE
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.conversion.certificate.compare import of_prompts
from tandem.conversion.certificate.content import Certificate
from tandem.conversion.certificate.options import TOLERANCE
from tandem.conversion.certificate.probes import prompt_ids
from tandem.conversion.certificate.write import NoCertificate, certify
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.files.publish import write_text_atomically
from tandem.frameworks import installed_frameworks
from tandem.models.end_tokens import GENERATION_CONFIG, end_ids


def add_certificate(
    work: Path,
    trained: TensorSource,
    written: TensorSource,
    companions: Companions,
    ai_framework: str | None,
    *,
    dtype: str | None,
    with_faults: bool,
) -> tuple[str, list[str]]:
    """Write the certificate into `work`, a folder that is not yet published. Arguments are as of `certify`.

    Returns:
        In words, what was written, and notices for the user.
    """
    frameworks = [ai_framework] if ai_framework else [framework.name for framework in installed_frameworks()]
    try:
        if not frameworks:
            raise NoCertificate("neither torch nor mindspore is installed")
        certificate = certify(
            trained, written, companions, stated_ends(companions), frameworks[0], dtype=dtype, with_faults=with_faults
        )
    except (NoCertificate, UserError) as reason:  # the model itself is written, and was checked
        return "", [f"no {CERTIFICATE}: {reason}"]
    write_text_atomically(work / CERTIFICATE, certificate.to_text())
    said = (
        f"{CERTIFICATE}: {len(certificate.probes)} prompts, {certificate.token_count} tokens as in training; "
        f"`tandem verify` compares others with it"
    )
    return said, [*_of_rounding(certificate), *_of_template(work, certificate), *_of_ends(work, certificate)]


def stated_ends(companions: Companions) -> tuple[int, ...]:
    """The tokens at which transformers stops: those of the first file that states any."""
    generation = end_ids(companion_json(companions, GENERATION_CONFIG), GENERATION_CONFIG)
    return generation or end_ids(companions.hf_config or {}, CONFIG)


def _of_rounding(certificate: Certificate) -> list[str]:
    """A notice when the numbers that are written compute something else than training."""
    if certificate.folder is None:
        return []
    largest = float(certificate.folder.distance(certificate.training).max())
    if largest <= TOLERANCE:
        return []
    return [
        f"rounding to {certificate.dtype} moves log-probabilities by up to {largest:.2g}; --params-dtype fp32 keeps "
        f"training's"
    ]


def _of_template(work: Path, certificate: Certificate) -> list[str]:
    """A notice when the folder's own chat template asks otherwise than training."""
    if not (work / "tokenizer.json").exists():
        return []
    tokenizer = Tokenizer(work)
    chats = [probe for probe in certificate.probes if probe.messages]
    found = []
    for probe in chats:
        try:
            ids = prompt_ids(tokenizer, None, [(message["role"], message["content"]) for message in probe.messages])
        except UserError:
            ids = None
        found.append(None if ids is None else tuple(ids))
    return [f"the folder's chat template: {difference.text}" for difference in of_prompts(chats, found)]


def _of_ends(work: Path, certificate: Certificate) -> list[str]:
    """A notice when a model that answers states no end token where transformers looks for it."""
    if certificate.end_ids or not (work / "tokenizer.json").exists():
        return []
    end = Tokenizer(work).eos_id
    if end is None or not any(probe.messages for probe in certificate.probes):
        return []
    return [
        f"neither {GENERATION_CONFIG} nor {CONFIG} states an end token: transformers ends no answer by itself. Write "
        f'{{"eos_token_id": {end}}} into {GENERATION_CONFIG} if answers shall end where the tokenizer\'s files say'
    ]
