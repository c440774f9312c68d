"""Choose the next token from a row of logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tandem.options import Options


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How tokens are chosen."""

    max_new_tokens: int = 128
    """Largest number of tokens in an answer."""
    temperature: float = 0.0
    """Randomness of the answer; 0 always takes the most likely token."""
    top_k: int = 0
    """Choose only among this many most likely tokens; 0 means all tokens."""
    top_p: float = 1.0
    """Choose only among the most likely tokens that together reach this probability."""
    seed: int = 1234
    """Seed of the random choices."""

    def problems(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens {self.max_new_tokens}: expected 1 or more"
        if self.temperature < 0:
            yield f"--temperature {self.temperature}: expected 0 or more"
        if self.top_k < 0:
            yield f"--top-k {self.top_k}: expected 0 or more"
        if not 0 < self.top_p <= 1:
            yield f"--top-p {self.top_p}: expected more than 0, and at most 1"


def draw(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Choose a token id from logits [vocabulary]: top-k first, then top-p (nucleus sampling, arXiv 1904.09751).

    >>> draw(np.array([0.1, 2.0, 0.3]), Sampling(temperature=0.0), np.random.default_rng(0))
    1
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    # the smallest set that reaches top_p: a token stays while the sum before it is below top_p
    in_nucleus = np.concatenate([[0.0], np.cumsum(probabilities)[:-1]]) < sampling.top_p
    probabilities = np.where(in_nucleus, probabilities, 0.0)
    return int(order[random.choice(len(order), p=probabilities / probabilities.sum())])
