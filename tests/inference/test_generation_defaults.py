"""What generation_config.json says is taken as transformers takes it, and said; tokens are left out as there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tandem.checkpoints.interface import Companions
from tandem.errors import UserError
from tandem.inference.defaults import Defaults, SamplingOptions
from tandem.inference.sampling import Chooser, Sampling, candidates, penalised

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}


def defaults(tmp_path: Path, **config: object) -> Defaults:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(config))
    return Defaults.of(Companions({}, [path]))


def test_a_model_that_samples_says_how(tmp_path: Path) -> None:
    found = defaults(tmp_path, **QWEN3, repetition_penalty=1.05)
    assert found.sampling(SamplingOptions()) == Sampling(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    assert found.notices(SamplingOptions()) == [
        "taken from generation_config.json: temperature 0.6, top k 20, top p 0.95, repetition penalty 1.05"
    ]
    assert found.sampling(SamplingOptions(top_p=0.5, seed=3)) == Sampling(
        temperature=0.6, top_k=20, top_p=0.5, repetition_penalty=1.05, seed=3
    )
    assert found.sampling(SamplingOptions(temperature=0, max_new_tokens=9)).temperature == 0


def test_without_do_sample_the_most_likely_token_is_taken(tmp_path: Path) -> None:
    found = defaults(tmp_path, temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert found.sampling(SamplingOptions()) == Sampling(repetition_penalty=1.1)
    assert found.notices(SamplingOptions(top_k=5)) == [
        "taken from generation_config.json: repetition penalty 1.1",
        "--top-k without effect: the most likely token is taken; give --temperature",
    ]
    assert found.sampling(SamplingOptions(temperature=0.9)) == Sampling(
        temperature=0.9, top_k=20, repetition_penalty=1.1
    )
    assert Defaults.of(Companions()).notices(SamplingOptions()) == []


def test_values_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generation_config\.json: top-p 2"):
        defaults(tmp_path, top_p=2)
    with pytest.raises(UserError, match="--max-new-tokens 0: expected 1 or more"):
        SamplingOptions(max_new_tokens=0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0.8, "top_p": 0.8},
        {"temperature": 0.8, "min_p": 0.1},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
def test_probabilities_are_those_of_transformers(options: dict[str, float]) -> None:
    import torch
    from transformers.generation import logits_process as theirs

    sampling = Sampling(**options)  # type: ignore[arg-type]
    logits = np.random.default_rng(0).normal(scale=3, size=400).astype(np.float32)
    seen = [3, 17, 4]
    steps = theirs.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(theirs.MinPLogitsWarper(sampling.min_p))
    expected = torch.softmax(steps(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0], -1).numpy()
    tokens, probabilities = candidates(penalised(logits, sorted(seen), sampling.repetition_penalty), sampling)
    found = np.zeros(400)
    found[tokens] = probabilities / probabilities.sum()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert Chooser(sampling, seen)(logits) in tokens


def test_top_k_1_is_greedy() -> None:
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    choose = Chooser(Sampling(temperature=1.5, top_k=1), [])
    assert {choose(logits) for _ in range(20)} == {int(logits.argmax())}
