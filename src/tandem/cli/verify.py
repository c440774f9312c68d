"""`tandem verify`: compare an exported folder, or a server, with what training computes."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.conversion.certificate.options import VerifyOptions

DESCRIPTION = (
    "Compare an exported folder with its certificate: transformers must ask, stop and compute as training does. With "
    "--url a server must. Differences are named with their likely cause, and end with exit code 1."
)


def run(argv: Sequence[str]) -> int:
    options = parse(VerifyOptions, "verify", DESCRIPTION, argv)
    from tandem.conversion.certificate.run import run_verify  # templates and tokenizers take time to start

    result = run_verify(options)
    print("\n".join(result.lines()))
    return 0 if result.passed else 1
