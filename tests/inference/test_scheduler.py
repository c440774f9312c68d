"""Continuous batching: what a request gets is what it gets alone, and what transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Scheduler
from toys import TOYS

PROMPTS = [[5, 9, 3], [17], list(range(100, 140)), [8, 8, 8, 8, 8, 8, 8], [200, 1]]


@pytest.fixture(scope="module", params=TOYS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    config = TOYS[request.param]
    copy(RandomSource(config, 3), HFSink(folder, config, "float32", Companions()))
    return folder


def engine_of(folder: Path, framework: str) -> Engine:
    source = open_source(folder)
    engine = create_engine(require_framework(framework), source.config, EngineSettings(training=False, device="cpu"))
    engine.load_weights(source)
    return engine


def theirs(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    made = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return list(made[0, len(prompt) :].tolist())


def test_greedy_answers_are_those_of_transformers(folder: Path, framework: str) -> None:
    """Requests of different lengths join and leave, two at a time."""
    counts = [12, 3, 9, 1, 7]
    with Scheduler(engine_of(folder, framework), max_batch_size=2, room=120) as scheduler:
        requests = [scheduler.submit(p, Sampling(max_new_tokens=n), ()) for p, n in zip(PROMPTS, counts)]
        scheduler.run()
    assert [request.tokens for request in requests] == [theirs(folder, *pair) for pair in zip(PROMPTS, counts)]
    assert {request.finish_reason for request in requests} == {"length"}
