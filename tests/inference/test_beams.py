"""Beam search finds what transformers' finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.inference.beams import beam_search
from tandem.inference.sampling import Sampling
from toys import toy_config

PROMPTS = [[5, 9, 3], [17, 4], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = toy_config(vocab_size=23, init_method_std=0.3, untie_embeddings_and_output_weights=True)
    copy(RandomSource(config, 3), HFSink(tmp_path_factory.mktemp("beams") / "m", config, "float32", Companions()))
    return tmp_path_factory.getbasetemp() / "beams0" / "m"


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("ends", [(), (6,), (6, 11, 2)])
def test_the_best_answer_is_that_of_transformers(folder: Path, beams: int, ends: tuple[int, ...]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_source(folder)
    engine = create_engine("torch", source.config, EngineSettings(training=False, device="cpu"))
    engine.load_weights(source)
    for prompt in PROMPTS:
        tokens = [token % 23 for token in prompt]
        theirs.generation_config.eos_token_id = list(ends) or None
        made = theirs.generate(
            torch.tensor([tokens]), max_new_tokens=10, num_beams=beams, do_sample=False, pad_token_id=0
        )[0, len(tokens) :].tolist()
        end = next((place for place, token in enumerate(made) if token in ends), len(made))
        assert beam_search(engine, tokens, Sampling(max_new_tokens=10), set(ends), beams) == made[:end]


def test_drawn_beams_depend_on_the_seed_alone(folder: Path) -> None:
    source = open_source(folder)
    engine = create_engine("torch", source.config, EngineSettings(training=False, device="cpu"))
    engine.load_weights(source)
    found = [
        beam_search(engine, [5, 9, 3], Sampling(max_new_tokens=10, temperature=1.0, seed=seed), (), 2)
        for seed in (1, 1, 2, 3)
    ]
    assert found[0] == found[1]
    assert len({tuple(answer) for answer in found}) > 1
