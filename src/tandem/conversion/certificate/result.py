"""What a comparison with a certificate found."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.conversion.certificate.compare import Difference, Numbers
from tandem.conversion.certificate.content import Certificate


@dataclass(frozen=True)
class Verified:
    """What a comparison with a certificate found.

    Attributes:
        subject: the folder, or the server's URL and model.
        reader: what computed it.
        differences: none when it computes what training computes.
        numbers: how log-probabilities compare; None when they could not be compared.
        not_compared: in words, what could not be compared, and why.
    """

    subject: str
    reader: str
    certificate: Certificate
    differences: tuple[Difference, ...]
    numbers: Numbers | None = None
    not_compared: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.differences

    def lines(self) -> list[str]:
        """For people."""
        certificate = self.certificate
        lines = [
            f"{self.subject}, by {self.reader}: {len(certificate.probes)} prompts, {certificate.token_count} tokens",
        ]
        if self.numbers is not None:
            lines.append(f"log-probabilities: largest difference from training {self.numbers.largest:.2e}")
            if self.numbers.rounded_at_export:
                lines.append(
                    f"> these are the numbers of the export, which rounded to {certificate.dtype}; "
                    f"--params-dtype fp32 keeps training's"
                )
        lines += [f"> not compared: {text}" for text in self.not_compared]
        lines += [f"DIFFERENT: {difference}" for difference in self.differences]
        if self.passed:
            whole = f"{self.subject} asks, stops and computes as training does"
            lines.append(f"what was compared of {self.subject} is as in training" if self.not_compared else whole)
        return lines
