"""Every sample of `tandem evaluate --tasks` is that of `lm_eval --model hf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import NAMES, Samples  # type: ignore[import-not-found]
from tandem.config.parsing import from_dict
from tandem.training.evaluate_tasks import evaluate_tasks
from workspace import Workspace

# case -> what the peer is given, and what Tandem is
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "shots": ({"shots": 2}, {"num_fewshot": 2}),
    "short": ({"max_length": 40}, {"max_position_embeddings": 40, "tokens_per_batch": 30}),
    "chat": ({"chat": True, "shots": 1}, {"apply_chat_template": True, "num_fewshot": 1}),
    "no thinking": (
        {"chat": True, "enable_thinking": False},
        {"apply_chat_template": True, "enable_thinking": "false"},
    ),
}


def ours(workspace: Workspace, task_folder: Path, tasks: list[str] = NAMES, **values: Any) -> Samples:
    settings = {"load": str(workspace.hf), "tasks": tasks, "include_path": str(task_folder), "log_samples": True}
    found = evaluate_tasks(from_dict({**settings, **values}, "test"))
    assert found is not None
    return dict(found.samples)


def assert_same(found: Samples, expected: Samples) -> None:
    assert found.keys() == expected.keys()
    for task, samples in expected.items():
        assert len(samples) == len(found[task]) > 0
        for one, other in zip(found[task], samples, strict=True):
            same = ("doc_id", "doc", "arguments", "doc_hash", "prompt_hash", "target_hash", "filter")
            assert [one[key] for key in same] == [other[key] for key in same]
            assert one["resps"] == (other["resps"] if task == "toy_answers" else close(other["resps"])), task
            for metric in other["metrics"]:
                assert one[metric] == pytest.approx(other[metric], abs=1e-4), (task, metric)


def close(values: Any) -> Any:
    """Log-likelihoods up to 1e-4, and whether they are greedy."""
    if isinstance(values, list):
        return [close(value) for value in values]
    if isinstance(values, tuple):
        return tuple(close(value) for value in values)
    return values if isinstance(values, bool) else pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_sample_is_that_of_lm_eval(
    workspace: Workspace,
    task_folder: Path,
    peer: Callable[..., Samples],
    framework: str,
    tmp_path: Path,
    case: str,
) -> None:
    theirs, values = CASES[case]
    found = ours(workspace, task_folder, ai_framework=framework, output=str(tmp_path / "out.json"), **values)
    assert_same(found, peer(**theirs))
