"""Experts that take a limited number of tokens (`--moe-expert-capacity-factor`), as Megatron-core computes it.

An expert takes at most ceil(T k / E * factor) of the T tokens of a micro-batch, where k of E experts are chosen for
each. Under sequence parallelism each tensor rank's part of the tokens counts for itself. A choice that an expert does
not take has a factor of 0: the other factors of the token stay as they are. The balancing losses count all choices.

Source: Megatron-core 0.16.1, `transformer/moe/moe_utils.py`, `apply_router_token_dropping`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tandem.config.settings import RouterSettings
from tandem.models.experts import Experts
from tandem.parallel.layout import even_rows


@dataclass(frozen=True)
class Capacity:
    """Which choices experts take.

    Attributes:
        parts: of the tokens of a micro-batch, each of which has a capacity of its own.
        by_probability: an expert takes the choices with the largest factors, and else the first ones. Of equal ones it
            takes the first.
    """

    experts: Experts
    factor: float
    parts: int
    by_probability: bool

    @classmethod
    def of(cls, settings: RouterSettings, experts: Experts, parts: int) -> Capacity | None:
        factor, policy = settings.moe_expert_capacity_factor, settings.moe_token_drop_policy
        return None if factor is None else cls(experts, factor, parts, policy == "probs")

    def limits(self, tokens: int) -> list[tuple[int, int, int]]:
        """The first and the last token of each part, and how many of them an expert takes."""
        ranges = [even_rows(tokens, self.parts, part) for part in range(self.parts)]
        return [(first, last, self._limit(last - first)) for first, last in ranges if first < last]

    def _limit(self, tokens: int) -> int:
        return math.ceil(tokens * self.experts.moe_router_topk / self.experts.num_experts * self.factor)

    def taken(self, chosen: np.ndarray, factors: np.ndarray, tokens: int) -> np.ndarray:
        """Which choices are taken: bool [t, k]. Those of padding, behind the first `tokens`, are none.

        Args:
            chosen: numbers of experts, [t, k].
            factors: of the choices, fp32 [t, k].
        """
        result = np.zeros(chosen.shape, bool)
        for first, last, limit in self.limits(tokens):
            flat = chosen[first:last].reshape(-1)
            numbers = np.arange(len(flat))
            if self.by_probability:
                numbers = np.argsort(-factors[first:last].reshape(-1), kind="stable")
            by_expert = numbers[np.argsort(flat[numbers], kind="stable")]
            experts = flat[by_expert]
            places = np.arange(len(flat)) - np.searchsorted(experts, experts)
            of_part = np.empty(len(flat), bool)
            of_part[by_expert] = places < limit
            result[first:last] = of_part.reshape(last - first, -1)
        return result
