"""lm-evaluation-harness asks the server with its own client, and gets what its own model answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from servers import serving

from workspace import Workspace

TASKS = Path(__file__).parents[1] / "harness" / "tasks"
NAMES = ["toy_choices", "toy_letters", "toy_continues", "toy_rolling", "toy_answers"]


@pytest.mark.slow("answers")
def test_every_sample_through_the_server_is_that_of_lm_evals_model(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="its client of servers needs more: pip install 'lm-eval[api]'")
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # it takes seconds
    for path in TASKS.iterdir():
        text = path.read_text(encoding="utf-8").replace("FOLDER", str(tmp_path))
        (tmp_path / path.name).write_text(text, encoding="utf-8")

    def samples(model: Any) -> dict[str, list[dict[str, Any]]]:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = evaluator.simple_evaluate(model=model, tasks=NAMES, task_manager=manager, bootstrap_iters=0)
        assert found is not None
        return dict(found["samples"])

    theirs = samples(HFLM(pretrained=str(workspace.hf), dtype="float32", device="cpu", batch_size=3))
    with serving({"toy": workspace.hf}) as server:
        ours = samples(
            LocalCompletionsAPI(
                base_url=f"{server.url}/v1/completions",
                model="toy",
                tokenizer_backend="huggingface",
                tokenizer=str(workspace.hf),
                max_length=512,
                batch_size=2,
            )
        )
    for name in NAMES:
        assert len(ours[name]) == len(theirs[name]) > 0
        for one, other in zip(ours[name], theirs[name]):
            assert one["doc_hash"] == other["doc_hash"]
            told, expected = flat(one["resps"]), flat(other["resps"])
            assert told == (expected if name == "toy_answers" else pytest.approx(expected, abs=1e-4)), name


def flat(values: Any) -> list[Any]:
    """The numbers and texts in lists of lists."""
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in flat(value)]
    return [values]
