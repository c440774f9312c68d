"""Answers in any layout are those of one process: tensor ranks, stages, copies of the model, and adapters on them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Case, engine_settings, toy_source
from session_job import PROMPTS, answers

from frameworks import require_framework
from launchers import launcher
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.backends.session import check_layout
from tandem.data.batch import IGNORE, MicroBatch
from tandem.errors import UserError
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Scheduler
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout

JOB = Path(__file__).with_name("session_job.py")
TWO = [Case(tp=2), Case(tp=2, tied=False, family="qwen2", adapters="dora"), Case(pp=2, tied=False), Case(dp=2)]
# The last one keeps sequences on each of the two ranks that share experts.
OF_EXPERTS = [
    Case(dp=2, family="qwen3_moe", tied=False),
    Case(tp=2, ep=2, etp=1, family="qwen3_moe"),
    Case(dp=2, ep=2, family="qwen3_moe"),
]
OF_MORE_EXPERTS = [
    Case(tp=2, dp=2, ep=2, family="qwen3_moe"),
    Case(dp=4, ep=2, family="qwen3_moe"),
    Case(pp=2, dp=2, ep=2, family="qwen3_moe", tied=False),
    Case(tp=2, dp=2, ep=2, extend=True, family="qwen3_moe"),
]
FOUR = [Case(tp=2, pp=2), Case(tp=2, dp=2, family="llama"), Case(pp=2, dp=2, adapters="lora")]


@functools.cache
def one_process(framework: str, case: Case) -> Any:
    source = toy_source(case)
    engine = create_engine(framework, source.config, engine_settings(case, Grid(), 0))
    engine.load_weights(source)
    return answers(engine)


def check(framework: str, processes: int, cases: list[Case], folder: Path) -> None:
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    words = [str(JOB), framework, str(folder / "cases.json"), str(folder)]
    done = subprocess.run(
        [*launcher(framework, processes, forked=True), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for case in cases:
        found = [json.loads((folder / f"{case.name}-{rank}.json").read_text()) for rank in range(processes)]
        leaders = [answer for answer in found if answer is not None]
        assert len(leaders) == Grid(case.layout, processes).copies_of_the_model, case.name
        expected = one_process(framework, case.work)
        for answer in leaders:
            assert (answer["tokens"], answer["best"]) == (expected["tokens"], expected["best"]), case.name
            assert answer["shared"] == [0, 0, 0, 0, 0, 0, 0, 29, 0, 29], case.name
            for ours, theirs in zip(answer["logprobs"], expected["logprobs"], strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=case.name)


def test_two_processes_answer_as_one_on_pytorch(tmp_path: Path) -> None:
    check(require_framework("torch"), 2, [*TWO, OF_EXPERTS[-1]], tmp_path)


@pytest.mark.slow("answers")
def test_two_processes_answer_as_one_on_mindspore(tmp_path: Path) -> None:
    check(require_framework("mindspore"), 2, [*TWO, *OF_EXPERTS], tmp_path)


@pytest.mark.slow("answers")
def test_four_processes_answer_as_one(tmp_path: Path, framework: str) -> None:
    check(framework, 4, [*FOUR, *OF_MORE_EXPERTS], tmp_path)


@pytest.mark.parametrize("adapters", ["lora", "dora"])
def test_adapters_are_computed_as_in_training(adapters: str, framework: str) -> None:
    """Not merged; and without them the answers are others."""
    case = Case(tied=False, family="qwen2", adapters=adapters)
    engine = create_engine(framework, toy_source(case).config, engine_settings(case, Grid(), 0))
    engine.load_weights(toy_source(case))
    with Scheduler(engine, room=100) as scheduler:
        request = scheduler.submit(PROMPTS[2], Sampling(max_new_tokens=5), (), prompt_logprobs=True)
        scheduler.run()
    text = [*request.prompt, *request.tokens]
    tokens, labels = (np.array(ids, np.int32) for ids in (text, [*text[1:], IGNORE]))
    batch = MicroBatch(tokens, labels, np.arange(len(text), dtype=np.int32), np.array([0, len(text)], np.int32))
    found = [*request.prompt_logprobs[1:], *request.logprobs]
    np.testing.assert_allclose(found, engine.log_probabilities([batch])[0][:-1], atol=1e-5)
    with engine.without_adapters():
        assert np.abs(np.array(found) - engine.log_probabilities([batch])[0][:-1]).max() > 0.01


def test_layouts_without_sessions_are_refused_by_name() -> None:
    two = Grid(Layout(tensor_model_parallel_size=2), 2)
    with pytest.raises(UserError, match="--sequence-parallel"):
        check_layout(two, EngineSettings(sequence_parallel=True))
    with pytest.raises(UserError, match="--use-torch-fsdp2"):
        check_layout(Grid(Layout(), 2), EngineSettings(use_torch_fsdp2=True))
    odd = Layout(tensor_model_parallel_size=2, expert_model_parallel_size=3, expert_tensor_parallel_size=1)
    with pytest.raises(UserError, match="--expert-model-parallel-size 3: to generate text, the 3 ranks"):
        check_layout(Grid(odd, 6), EngineSettings())
