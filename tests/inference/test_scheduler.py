"""Continuous batching: what a request gets is what it gets alone, and what transformers gives."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tandem.inference.scheduler as scheduler_module
from frameworks import require_framework
from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, MicroBatch
from tandem.errors import UserError
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Request, Scheduler
from tandem.models.config import ModelConfig
from toys import TOYS
from workspace import Workspace

PROMPTS = [[5, 9, 3], [17], list(range(100, 140)), [8, 8, 8, 8, 8, 8, 8], [200, 1]]


@pytest.fixture(scope="module", params=TOYS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp(request.param), TOYS[request.param])


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tied"), TOYS["qwen3-tied"])


def written(place: Path, config: ModelConfig) -> Path:
    copy(RandomSource(config, 3), HFSink(place / "model", config, "float32", Companions()))
    return place / "model"


def engine_of(folder: Path, framework: str, **settings: bool) -> Engine:
    source = open_source(folder)
    chosen = EngineSettings(training=False, device="cpu", **settings)  # type: ignore[arg-type]
    engine = create_engine(require_framework(framework), source.config, chosen)
    engine.load_weights(source)
    return engine


def theirs(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    made = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return list(made[0, len(prompt) :].tolist())


def answered(engine: Engine, prompts: list[list[int]], sampling: Sampling, at_a_time: int) -> list[list[int]]:
    with Scheduler(engine, at_a_time, room=1000) as scheduler:
        requests = [scheduler.submit(prompt, sampling, ()) for prompt in prompts]
        scheduler.run()
    return [request.tokens for request in requests]


def test_greedy_answers_are_those_of_transformers(folder: Path, framework: str) -> None:
    """Requests of different lengths join and leave, two at a time."""
    counts = [12, 3, 9, 1, 7]
    with Scheduler(engine_of(folder, framework), max_batch_size=2, room=120) as scheduler:
        requests = [scheduler.submit(p, Sampling(max_new_tokens=n), ()) for p, n in zip(PROMPTS, counts)]
        scheduler.run()
    assert [request.tokens for request in requests] == [theirs(folder, *pair) for pair in zip(PROMPTS, counts)]
    assert {request.finish_reason for request in requests} == {"length"}


def test_random_answers_do_not_depend_on_what_else_runs(tied: Path, framework: str) -> None:
    engine = engine_of(tied, framework)
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=5)
    alone = [answered(engine, [prompt], sampling, 1)[0] for prompt in PROMPTS]
    assert answered(engine, PROMPTS, sampling, 2) == alone
    assert answered(engine, PROMPTS[::-1], sampling, 5) == alone[::-1]
    assert answered(engine, [PROMPTS[0]] * 2, sampling, 2) == [alone[0]] * 2
    assert answered(engine, [PROMPTS[0]], replace(sampling, seed=6), 1) != alone[:1]


def test_log_probabilities_are_those_of_training(tied: Path, framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts that take several steps, of their parts, and of answers, with others next to them."""
    monkeypatch.setattr(scheduler_module, "PROMPT_TOKENS", 16)
    engine = engine_of(tied, framework)
    with Scheduler(engine, room=400) as scheduler:
        asked = [
            scheduler.submit(prompt, Sampling(max_new_tokens=9), (), top_logprobs=3, prompt_logprobs=True)
            for prompt in PROMPTS
        ]
        scheduler.run()
    for request in asked:
        text = [*request.prompt, *request.tokens]
        lengths = {len(request.tokens), len(request.logprobs), len(request.top)}
        assert (lengths, len(request.prompt_logprobs), len(request.prompt_top)) == ({9}, *[len(request.prompt)] * 2)
        (expected,) = engine.log_probabilities([labelled(text)])
        found = [*request.prompt_logprobs[1:], *request.logprobs]
        np.testing.assert_allclose(found, expected[:-1], atol=1e-5)
        logits = engine.logits(labelled(text)).astype(np.float64)
        for row, top in zip(logits, [*request.prompt_top[1:], *request.top]):
            likely = np.argsort(-row)[:3]
            assert [token for token, _ in top or ()] == likely.tolist()
            scores = (row - np.log(np.exp(row).sum()))[likely]
            np.testing.assert_allclose([score for _, score in top or ()], scores, atol=1e-5)


def labelled(text: list[int]) -> MicroBatch:
    """A text in which each token must predict the next."""
    count = len(text)
    labels = np.array([*text[1:], IGNORE], np.int32)
    return MicroBatch(
        np.array(text, np.int32), labels, np.arange(count, dtype=np.int32), np.array([0, count], np.int32)
    )


def test_a_prompt_is_scored_without_an_answer(tied: Path) -> None:
    with Scheduler(engine_of(tied, "torch"), room=100) as scheduler:
        request = scheduler.submit(PROMPTS[0], Sampling(max_new_tokens=0), (), prompt_logprobs=True)
        scheduler.run()
    assert (request.tokens, request.finish_reason, len(request.prompt_logprobs)) == ([], "length", 3)


def test_answers_end_and_are_given_up(tied: Path) -> None:
    engine = engine_of(tied, "torch")
    whole = answered(engine, [PROMPTS[0]], Sampling(max_new_tokens=12), 1)[0]
    heard: list[tuple[int, str | None]] = []
    with Scheduler(engine, 2, room=100) as scheduler:

        def hear(request: Request) -> None:
            heard.append((len(request.tokens), request.finish_reason))
            if len(request.tokens) == 3:
                request.stop()

        ended = scheduler.submit(PROMPTS[0], Sampling(max_new_tokens=12), {whole[5]})
        stopped = scheduler.submit(PROMPTS[0], Sampling(max_new_tokens=12), (), on_token=hear)
        waits = scheduler.submit(PROMPTS[1], Sampling(), ())
        assert scheduler.step()
        scheduler.cancel(waits)
        scheduler.run()
        runs = scheduler.submit(PROMPTS[0], Sampling(), ())
        scheduler.step()
        scheduler.cancel(runs)
        assert not scheduler.step()
        long = scheduler.submit([3] * 90, Sampling(max_new_tokens=10), ())  # all that was kept makes room for it
        scheduler.run()
        assert len(long.tokens) == 10
    first = whole.index(whole[5])
    assert (ended.tokens, ended.finish_reason, ended.end_token) == (whole[:first], "stop", whole[5])
    assert (stopped.tokens, stopped.finish_reason, stopped.end_token) == (whole[:3], "stop", None)
    assert heard == [(1, None), (2, None), (3, None)]
    assert [(request.tokens, request.finish_reason) for request in (waits, runs)] == [
        ([], "cancelled"),
        (whole[:1], "cancelled"),
    ]


def test_answers_end_where_the_positions_end(tied: Path) -> None:
    with Scheduler(engine_of(tied, "torch")) as scheduler:
        request = scheduler.submit([7] * 508, Sampling(max_new_tokens=50), ())
        scheduler.run()
        assert (len(request.tokens), request.finish_reason) == (4, "length")
        for prompt, message in {
            (): "is empty",
            (7,) * 512: "512 tokens",
            (7, 211): "token id 211",
            (-1,): "id -1",
        }.items():
            with pytest.raises(UserError, match=message):
                scheduler.submit(prompt, Sampling(), ())


@pytest.mark.parametrize(("fp16", "size"), [(False, 4), (True, 2)])
def test_keys_and_values_are_kept_in_the_dtype_of_the_model(tied: Path, framework: str, fp16: bool, size: int) -> None:
    engine = engine_of(tied, framework, fp16=fp16)
    session = engine.session(50)
    number = session.begin(50)
    cache = session._sequences[number].cache  # type: ignore[attr-defined]
    assert engine.bytes_per_cached_token() == 3 * 2 * 2 * 16 * size
    assert sum(kept.nbytes for kept in cache.values()) == 50 * engine.bytes_per_cached_token()
    with pytest.raises(UserError, match="1 tokens does not fit: 0 of 50 are free"):
        session.begin(1)
    assert answered(engine, PROMPTS, Sampling(max_new_tokens=5), 3) == [
        answered(engine, [prompt], Sampling(max_new_tokens=5), 1)[0] for prompt in PROMPTS
    ]


def test_keys_and_values_are_kept_in_bf16(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device computes in it, as this one is made to believe. Answers are scored as in training."""
    require_framework("torch")
    monkeypatch.setattr("tandem.backends.torch.engine.has_native_bf16", lambda device: True)
    engine = engine_of(tied, "torch", bf16=True)
    session = engine.session(50)
    cache = session._sequences[session.begin(50)].cache  # type: ignore[attr-defined]
    assert {str(kept.dtype) for kept in cache.values()} == {"torch.bfloat16"}
    assert sum(kept.nbytes for kept in cache.values()) == 50 * engine.bytes_per_cached_token()
    with Scheduler(engine, room=100) as scheduler:
        request = scheduler.submit(PROMPTS[2], Sampling(max_new_tokens=9), (), prompt_logprobs=True)
        scheduler.run()
    (expected,) = engine.log_probabilities([labelled([*request.prompt, *request.tokens])])
    found = [*request.prompt_logprobs[1:], *request.logprobs]
    np.testing.assert_allclose(found, expected[:-1], atol=0.03)


def test_memory_that_is_not_there_is_refused(tied: Path) -> None:
    with pytest.raises(UserError, match=r"keys and values of 1,000,000,000,000 tokens need 768000.00 GB, and .* free"):
        engine_of(tied, "torch").session(10**12)


# Answers, and the bytes of the process between them.
SOAK = """
import sys
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.detect import open_source
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Scheduler

source = open_source(sys.argv[2])
engine = create_engine(sys.argv[1], source.config, EngineSettings(training=False, device="cpu"))
engine.load_weights(source)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
with Scheduler(engine, 4, room=500) as scheduler:
    for number in range(120):
        if number == 60:  # by now allocators and caches have what they need
            before = resident()
        scheduler.submit([5] * (1 + 7 * number % 60), Sampling(max_new_tokens=1 + number % 9), ())
        scheduler.run()
print((resident() - before) // 60)
"""


@pytest.mark.slow("answers")
def test_answers_take_no_more_memory(tied: Path, framework: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOAK, framework, str(tied)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 4_000


# Prompts of many lengths, and the bytes of the process.
LENGTHS = """
import sys
import tandem
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Scheduler

model = tandem.load(sys.argv[2], ai_framework=sys.argv[1])
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
with Scheduler(model.engine, 1, room=500) as scheduler:
    for length in range(1, 161):
        if length == 41:
            before = resident()
        scheduler.submit([length % 7 + 1] * length, Sampling(max_new_tokens=1), ())
        scheduler.run()
print(resident() - before)
"""


@pytest.mark.slow("answers")
def test_new_lengths_take_no_more_memory(workspace: Workspace, framework: str) -> None:
    """PyTorch on CPU would keep 2.5 MB for each."""
    words = [sys.executable, "-c", LENGTHS, framework, str(workspace.hf)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 120 * 100_000
