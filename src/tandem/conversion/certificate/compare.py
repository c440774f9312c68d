"""What differs from a certificate, and the likely cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.conversion.certificate.content import Certificate, Computed, Probe
from tandem.conversion.certificate.write import (
    DEFAULT_THETA,
    NEW_NORMS,
    NO_ADAPTERS,
    NO_NORMS,
    NO_SCALING,
    ROUNDED,
)
from tandem.models.config import ModelConfig

# Names of causes
TEMPLATE = "other template"
TOKENIZER = "other tokenizer"
END_TOKEN = "other end token"
ADAPTER = "unmerged adapter"
NORM = "lost q/k norm"
ROUNDING = "rounding"
ROPE = "other rope"
MISSING = "missing weights"
CONFIG = "other config"
WEIGHTS = "other weights"

CAUSES = {
    NO_ADAPTERS: (ADAPTER, "the numbers are those of the base without its adapters: merge them (`tandem export`)"),
    **{name: (NORM, f"the numbers are those {name}: weights were not read") for name in NEW_NORMS},
    NO_NORMS: (NORM, "the numbers are those of the model without q_norm and k_norm: it runs as another architecture"),
    DEFAULT_THETA: (
        ROPE,
        "the numbers are those of rope_theta 10000: the reader did not find the config's",
    ),
    NO_SCALING: (ROPE, "the numbers are those of the model without its rotary scaling"),
    ROUNDED: (ROUNDING, "the numbers are those of weights rounded to bfloat16: export or merge in float32"),
}
NO_STATED_END = (
    "the end token: neither generation_config.json nor config.json stated an eos_token_id when the model was exported"
)
CLOSER = 0.25  # a fault is named when the numbers are so much closer to it than to training, on average
SMALL = 0.05  # rounding in 16 bits moves log-probabilities by less, on average
FACTOR = 4.0  # computing in bfloat16 moves them by so many times more than rounding the weights does, at most
ROTARY_FIELDS = {"rotary_base", "rotary_scaling"}
IRRELEVANT = {"max_position_embeddings", "init_method_std", "lora"}


@dataclass(frozen=True)
class Difference:
    """One difference, with the name of its likely cause."""

    cause: str
    text: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.text}"


def of_prompts(probes: Sequence[Probe], found: Sequence[tuple[int, ...] | None]) -> list[Difference]:
    """Differences of the tokens of prompts. Plain text shows the tokenizer, conversations the template."""
    wrong = []
    for probe, ids in zip(probes, found, strict=True):
        if ids is not None and probe.text:
            ids = ids[: len(probe.prompt_ids)]  # some tokenizers put an end token after a text
        if ids != probe.prompt_ids:
            wrong.append((probe, ids))
    if any(probe.text for probe, _ in wrong):
        return [Difference(TOKENIZER, _describe(*next(pair for pair in wrong if pair[0].text)))]
    if not wrong:
        return []
    count = sum(bool(probe.messages) for probe in probes)
    return [
        Difference(
            TEMPLATE, f"{len(wrong)} of {count} conversations are not asked as in training; {_describe(*wrong[0])}"
        )
    ]


def _describe(probe: Probe, ids: tuple[int, ...] | None) -> str:
    if ids is None:
        return f"{probe.title} cannot be asked: there is no template, or it refuses the conversation"
    same = next((n for n, pair in enumerate(zip(ids, probe.prompt_ids)) if pair[0] != pair[1]), None)
    place = f"they differ from token {same} on" if same is not None else "one is the beginning of the other"
    return f"{probe.title} has {len(ids)} tokens, {len(probe.prompt_ids)} in training; {place}"


def of_end_ids(certificate: Certificate, found: Sequence[int], where: str) -> list[Difference]:
    """Differences of the tokens that end an answer."""
    expected = dict(zip(certificate.end_ids, certificate.end_texts))
    lost, new = sorted(expected.keys() - set(found)), sorted(set(found) - expected.keys())
    parts = []
    if lost:
        parts.append(
            f"answers end at {', '.join(f'{expected[token]} ({token})' for token in lost)}, and {where} does not"
        )
    if new:
        parts.append(f"{where} ends them at {', '.join(map(str, new))}")
    return [Difference(END_TOKEN, "; ".join(parts))] if parts else []


def of_config(expected: ModelConfig, found: ModelConfig) -> list[Difference]:
    """Differences of what a config says, where it changes what is computed."""
    left, right = expected.to_dict(), found.to_dict()
    names = [name for name in left if left[name] != right.get(name) and name not in IRRELEVANT]
    differences = []
    for cause, chosen in ((ROPE, ROTARY_FIELDS), (CONFIG, set(names) - ROTARY_FIELDS)):
        if these := [f"{name} is {right.get(name)}, {left[name]} in training" for name in names if name in chosen]:
            differences.append(Difference(cause, "; ".join(these)))
    return differences


def of_tensors(missing: Sequence[str], unexpected: Sequence[str]) -> list[Difference]:
    """Differences of the names of weights."""
    differences = []
    for names, what in ((missing, "the files lack"), (unexpected, "the model does not use")):
        groups: dict[str, list[str]] = {}
        for name in names:
            kind = NORM if "q_norm" in name or "k_norm" in name else ADAPTER if "lora_" in name else None
            groups.setdefault(kind or (MISSING if what == "the files lack" else CONFIG), []).append(name)
        for cause, these in groups.items():
            more = f" and {len(these) - 1} more" if len(these) > 1 else ""
            differences.append(Difference(cause, f"{what} {these[0]}{more}"))
    return differences


@dataclass(frozen=True)
class Numbers:
    """How log-probabilities compare.

    Attributes:
        largest: the largest difference from training.
        rounded_at_export: whether the numbers are those that the export announced, and not training's.
        difference: the cause when they are neither; else None.
    """

    largest: float
    rounded_at_export: bool = False
    difference: Difference | None = None


def of_numbers(certificate: Certificate, found: Computed, tolerance: float, dtype: str | None = None) -> Numbers:
    """Compare log-probabilities, and name what explains the difference.

    Args:
        dtype: of the weights that gave them; None when it is not known.
    """
    distance = found.distance(certificate.training)
    largest, mean = float(distance.max()), float(distance.mean())
    if largest <= tolerance:
        return Numbers(largest)
    if certificate.folder is not None and float(found.distance(certificate.folder).max()) <= tolerance:
        return Numbers(largest, rounded_at_export=True)
    said = f"log-probabilities differ by up to {largest:.2g}, by {mean:.2g} on average"
    means = {name: float(found.distance(other).mean()) for name, other in certificate.alternatives.items()}
    nearest = min(means, key=lambda name: means[name], default=None)
    if nearest is not None and means[nearest] <= CLOSER * mean:
        cause, text = CAUSES[nearest]
        return Numbers(largest, difference=Difference(cause, f"{said}; {text}"))
    usual = FACTOR * _rounding(certificate)
    if mean <= usual or (dtype not in (None, certificate.dtype) and mean <= SMALL):
        stated = (
            f"the weights are {dtype} there, {certificate.dtype} when exported" if dtype else "16 bits can explain it"
        )
        return Numbers(largest, difference=Difference(ROUNDING, f"{said}; {stated}"))
    return Numbers(largest, difference=Difference(WEIGHTS, f"{said}, more than rounding explains"))


def _rounding(certificate: Certificate) -> float:
    """By how much rounding to bfloat16 moves the model's log-probabilities, on average."""
    for other in (certificate.alternatives.get(ROUNDED), certificate.folder):
        if other is not None:
            return float(np.mean(other.distance(certificate.training)))
    return SMALL / FACTOR
