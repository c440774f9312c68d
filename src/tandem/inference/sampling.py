"""Choose the next token from a row of logits, as transformers does: penalty, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    min_p: float = 0.0
    """Choose only among tokens that are at least this many times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that the text already has by this (arXiv 1909.05858); 1 changes nothing."""
    seed: int = 1234
    """Seed of the random choices. Each prompt draws from its own numbers: it gets the same answer alone or with others.
    """

    def problems(self) -> Iterator[str]:
        if self.max_new_tokens < 0:
            yield f"--max-new-tokens {self.max_new_tokens}: expected 0 or more"
        if not 0 <= self.temperature < math.inf:
            yield f"--temperature {self.temperature}: expected 0 or more"
        if self.top_k < 0:
            yield f"--top-k {self.top_k}: expected 0 or more"
        if not 0 < self.top_p <= 1:
            yield f"--top-p {self.top_p}: expected more than 0, and at most 1"
        if not 0 <= self.min_p <= 1:
            yield f"--min-p {self.min_p}: expected 0 to 1"
        if not 0 < self.repetition_penalty < math.inf:
            yield f"--repetition-penalty {self.repetition_penalty}: expected more than 0"
        if self.seed < 0:
            yield f"--seed {self.seed}: expected 0 or more"


class Chooser:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else None

    def __call__(self, logits: np.ndarray) -> int:
        """The next token, from logits fp32 [vocabulary].

        >>> Chooser(Sampling(temperature=0.0), [])(np.array([0.1, 2.0, 0.3]))
        1
        """
        if self._seen is not None:
            logits = penalised(logits, sorted(self._seen), self._sampling.repetition_penalty)
        token = int(logits.argmax()) if self._sampling.temperature == 0 else self._draw(logits)
        if self._seen is not None:
            self._seen.add(token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        tokens, probabilities = candidates(logits, self._sampling)
        totals = np.cumsum(probabilities)
        place = np.searchsorted(totals, self._random.random() * totals[-1], side="right")
        return int(tokens[min(place, len(tokens) - 1)])


def penalised(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Logits in which the tokens that were seen are less likely: divided by the penalty, or, below 0, multiplied."""
    logits = logits.copy()
    scores = logits[seen]
    logits[seen] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return logits


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens to choose from, ascending, and their probabilities, which may sum to less than 1.

    Equally likely tokens are kept or left out together by top-k, as by transformers. Top-p is nucleus sampling (arXiv
    1904.09751), min-p arXiv 2407.01082.
    """
    tokens = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        least = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        tokens = np.flatnonzero(logits >= least)
        logits = logits[tokens]
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # near 0 all tokens but the most likely one are infinitely far
        scores = (scores - scores.max()) / sampling.temperature
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = _nucleus(probabilities, sampling.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the smallest set that reaches top_p, ascending: a token stays while the sum before it is less."""
    # Tokens below this have less than 1 - top_p together, so the others reach top_p. It saves sorting most of them.
    likely = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    before = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])
    return np.sort(order[before < top_p])


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax of logits fp32 [vocabulary]: fp32."""
    shifted = logits - logits.max()
    return shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))


def most_likely(scores: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The `count` tokens with the highest scores, the highest first, with their scores.

    >>> most_likely(np.array([0.5, 2.0, 1.0]), 2)
    [(1, 2.0), (2, 1.0)]
    """
    count = min(count, len(scores))
    tokens = np.argpartition(scores, -count)[-count:]
    return [(int(token), float(scores[token])) for token in tokens[np.argsort(-scores[tokens], kind="stable")]]
