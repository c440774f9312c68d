"""Tasks of lm-evaluation-harness by name are those of its own list, which takes half a minute."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.harness.task_files import add_tasks, defined_names


@pytest.fixture(scope="module")
def home() -> Path:
    return Path(pytest.importorskip("lm_eval.tasks").__file__).parent


def needed(known: dict[str, Any], name: str) -> set[str]:
    """What lm-evaluation-harness reads to build it."""
    if name not in known:
        return {name}
    entry = known[name]
    members = (entry.cfg or {}).get("task")
    found = {name, *(entry.tags if entry.yaml_path is None else ())}  # a tag's tasks, and not a task's tags
    for member in members if isinstance(members, list) else []:
        inner = member if isinstance(member, str) else member.get("group", member.get("task"))
        found |= needed(known, inner)
    return found


def test_what_is_read_is_small_and_enough(home: Path) -> None:
    """A task; a group of groups; a group whose tasks are in other folders; and what stands there already stays."""
    mine = SimpleNamespace(cfg=None)
    index: dict[str, Any] = {"hellaswag": mine}
    add_tasks(index, ["hellaswag", "openllm"], home)
    assert index["hellaswag"] is mine
    assert {"openllm", "gsm8k", "arc_challenge", "mmlu_stem", "mmlu_anatomy"} <= index.keys()
    assert len(index) < 14_000 / 5
    index = {}
    add_tasks(index, ["truthfulqa_g*"], home)
    assert "truthfulqa_gen" in index
    add_tasks(index, ["no such task"], home)
    assert "no such task" not in index
    assert {"hellaswag", "mmlu"} <= set(defined_names(home))


@pytest.mark.slow("answers")
def test_every_task_group_and_tag_is_that_of_the_list(home: Path) -> None:
    from lm_eval.tasks import TaskManager

    whole = TaskManager().task_index
    kinds: dict[str, list[str]] = {}
    for name, entry in whole.items():
        kinds.setdefault(entry.kind.name, []).append(name)
    assert len(kinds["GROUP"]) > 100
    # Some of all kinds: to find one takes up to seconds, and there are 14,000.
    for name in [*kinds["GROUP"][::30], *kinds["TAG"][::30], *kinds["TASK"][::1000], *kinds["PY_TASK"][::100]]:
        index: dict[str, Any] = {}
        add_tasks(index, [name], home)
        for one in needed(whole, name):
            assert (one in index) == (one in whole), (name, one)
            if one in whole:
                found, expected = index[one], whole[one]
                assert (found.yaml_path, found.tags, found.cfg) == (
                    expected.yaml_path,
                    expected.tags,
                    expected.cfg,
                ), (name, one)
