"""The next token from a row of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tandem.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"--temperature {self.temperature} --top-k {self.top_k} --top-p {self.top_p}: "
                f"expected temperature >= 0, top-k >= 0, 0 < top-p <= 1"
            )


def draw(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """One token id from logits [vocabulary]: top-k, then top-p (nucleus, arXiv 1904.09751), then a draw."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    # the smallest set whose mass reaches top_p: a token stays while the mass before it is below top_p
    kept = np.concatenate([[0.0], np.cumsum(probabilities)[:-1]]) < sampling.top_p
    probabilities = np.where(kept, probabilities, 0.0)
    return int(order[random.choice(len(order), p=probabilities / probabilities.sum())])
