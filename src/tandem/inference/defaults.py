"""How tokens are chosen where the user does not say: as the model's generation_config.json states it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from tandem.checkpoints.hf.companions import companion_json
from tandem.checkpoints.interface import Companions
from tandem.errors import UserError
from tandem.inference.sampling import Sampling
from tandem.models.end_tokens import GENERATION_CONFIG
from tandem.options import Options

MAX_NEW_TOKENS = 128  # where neither the user nor the model says how many
RANDOM = ("temperature", "top_k", "top_p", "min_p")  # what transformers takes only with "do_sample": true
TAKEN = (*RANDOM, "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How tokens are chosen. What is not given is taken from the model's generation_config.json."""

    max_new_tokens: int | None = None
    """Largest number of tokens in an answer; default: what the model's generation_config.json says, or 128; in
    `tandem chat` 2048."""
    temperature: float | None = None
    """Randomness of the answer; 0 always takes the most likely token. Default: the model's, where its
    generation_config.json says "do_sample", else 0."""
    top_k: int | None = None
    """Choose only among this many most likely tokens; 0 means all tokens, and 1 the most likely one. Default: the
    model's, or 0."""
    top_p: float | None = None
    """Choose only among the most likely tokens that together reach this probability. Default: the model's, or 1."""
    min_p: float | None = None
    """Choose only among tokens that are at least this many times as likely as the most likely one. Default: the
    model's, or 0."""
    repetition_penalty: float | None = None
    """Divide the logits of tokens that the text already has by this; 1 changes nothing. Default: the model's, or 1."""
    seed: int = 1234
    """Seed of the random choices. Each prompt draws from it alone: it gets the same answer alone or with others."""

    def problems(self) -> Iterator[str]:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            yield f"--max-new-tokens {self.max_new_tokens}: expected 1 or more"
        try:
            Sampling(**{name: value for name, value in self.given().items() if name != "max_new_tokens"})
        except UserError as error:
            yield from error.problems

    def given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Defaults:
    """What a model's generation_config.json says of how tokens are chosen.

    Attributes:
        values: by the name of the option.
        samples: whether tokens are drawn when no temperature is given.
    """

    values: dict[str, Any]
    samples: bool = False

    @classmethod
    def of(cls, companions: Companions) -> Defaults:
        """
        Raises:
            UserError: a value cannot be used.
        """
        config = companion_json(companions, GENERATION_CONFIG)
        values = {name: config[name] for name in TAKEN if config.get(name) is not None}
        try:
            SamplingOptions(**values)
        except UserError as error:
            problems = [f"{GENERATION_CONFIG}: {problem.removeprefix('--')}" for problem in error.problems]
            raise UserError(*problems) from None
        return cls(values, bool(config.get("do_sample")))

    def sampling(self, options: SamplingOptions) -> Sampling:
        """How tokens are chosen: by the options, and where they say nothing, by the model.

        As in transformers, a model that does not say "do_sample" is not random unless a temperature is given.

        >>> Defaults({"temperature": 0.6, "top_k": 20}).sampling(SamplingOptions()).temperature
        0.0
        >>> Defaults({"temperature": 0.6, "top_k": 20}, samples=True).sampling(SamplingOptions(top_p=0.5)).temperature
        0.6
        """
        given = options.given()
        if not self.samples and "temperature" not in given:
            own = {name: value for name, value in self.values.items() if name not in RANDOM}
            return Sampling(**{"max_new_tokens": MAX_NEW_TOKENS, **own, **given})
        return Sampling(**{"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0, **self.values, **given})

    def notices(self, options: SamplingOptions) -> list[str]:
        """What was taken from the model's file, and which options do nothing."""
        given, sampling = options.given(), self.sampling(options)
        greedy = sampling.temperature == 0
        taken = {
            name: value
            for name, value in self.values.items()
            if name not in given and not (greedy and name in RANDOM) and value != _neutral(name)
        }
        texts = []
        if taken:
            words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in taken.items())
            texts.append(f"taken from {GENERATION_CONFIG}: {words}")
        idle = [f"--{name.replace('_', '-')}" for name in RANDOM[1:] if name in given and greedy]
        if idle:
            texts.append(f"{' '.join(idle)} without effect: the most likely token is taken; give --temperature")
        return texts


def _neutral(name: str) -> Any:
    return {field.name: field.default for field in fields(Sampling)}[name]


def greedy(sampling: Sampling) -> Sampling:
    """The same, but always with the most likely token."""
    return replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
