"""Small tasks of lm-evaluation-harness, and what its own `hf` model answers to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import NAMES, Samples

from workspace import Workspace

TASKS = Path(__file__).with_name("tasks")


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is fetched, and no cache of the user is read or written. The libraries read this when imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path_factory.mktemp("hf")))


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for --include-path, whose tasks name their data by absolute paths."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    for path in TASKS.iterdir():
        text = path.read_text(encoding="utf-8").replace("FOLDER", str(folder))
        (folder / path.name).write_text(text, encoding="utf-8")
    return folder


def with_adapter(base: Path, adapter: str) -> Any:
    peft, transformers, torch = (pytest.importorskip(name) for name in ("peft", "transformers", "torch"))
    return peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )


@pytest.fixture(scope="session")
def peer(workspace: Workspace, task_folder: Path) -> Callable[..., Samples]:
    """The samples of `lm_eval --model hf`, on the toy job's model."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    @lru_cache
    def model(arguments: frozenset[tuple[str, Any]]) -> Any:
        from lm_eval.models.huggingface import HFLM

        given = {"pretrained": str(workspace.hf), "batch_size": 3, **dict(arguments)}
        if adapter := given.pop("adapter", None):
            # not its `peft` argument, which also cuts the embedding to the tokenizer's length; and one by one: in a
            # batch it goes on after an end token that only the tokenizer names, and what follows would count
            return HFLM(pretrained=with_adapter(workspace.hf, adapter), tokenizer=str(workspace.hf), batch_size=1)
        return HFLM(dtype="float32", device="cpu", **given)

    @lru_cache
    def ask(tasks: tuple[str, ...] = NAMES, shots: int | None = None, chat: bool = False, **arguments: Any) -> Samples:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluator, "add_env_info", lambda _: None)  # it takes seconds
            results = evaluator.simple_evaluate(
                model=model(frozenset(arguments.items())),
                tasks=list(tasks),
                num_fewshot=shots,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
                bootstrap_iters=0,
            )
        assert results is not None
        return dict(results["samples"])

    return ask
