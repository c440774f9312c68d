"""Drawing tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tandem.errors import UserError
from tandem.inference.defaults import SamplingOptions
from tandem.inference.sampling import Chooser, Sampling
from tandem.options import build

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def frequencies(**options: float) -> np.ndarray:
    choose = Chooser(Sampling(**options), [])  # type: ignore[arg-type]
    draws = [choose(LOGITS) for _ in range(4000)]
    return np.bincount(draws, minlength=4) / 4000


def test_greedy() -> None:
    assert frequencies(temperature=0)[0] == 1


def test_temperature_one_follows_the_probabilities() -> None:
    assert frequencies(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert frequencies(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(temperature=1.0, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(temperature=1.0, top_p=0.4)[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": -1}, {"min_p": 2}),
        *({name: float(value)} for name in ("temperature", "repetition_penalty") for value in ("nan", "inf")),
    ],
)
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(UserError):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_near_no_temperature_the_most_likely_token_is_drawn(temperature: float) -> None:
    choose = Chooser(Sampling(temperature=temperature), [])
    assert [choose(np.array([0.5, -3, 2, 1.9], np.float32)) for _ in range(3)] == [2, 2, 2]


def test_no_option_is_not_a_number() -> None:
    with pytest.raises(UserError, match="expected a number"):
        build(SamplingOptions, {"temperature": "nan"})
