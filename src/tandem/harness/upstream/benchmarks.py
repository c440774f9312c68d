"""Upstream's benchmarks by name: which files they read, and which tasks of lm-evaluation-harness they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError, nearest
from tandem.harness.library import load_specs, require_library
from tandem.harness.upstream.answers import agieval, bbh, boolq, gsm8k
from tandem.harness.upstream.exams import C_EVAL, CMMLU, MMLU
from tandem.harness.upstream.needles import needlebench
from tandem.harness.upstream.programs import human_eval
from tandem.harness.upstream.spec import Spec


@dataclass(frozen=True)
class Wanted:
    """What the flags say of the benchmarks.

    Attributes:
        positions: the most tokens that the model takes.
    """

    names: Sequence[str]
    folders: Sequence[str]
    tokenizer: Tokenizer
    positions: int
    max_new_tokens: int | None = None
    chain_of_thought: bool = False


@dataclass(frozen=True)
class Known:
    """A benchmark.

    Attributes:
        folders: of lm-evaluation-harness's tasks that it builds on.
        files: what it looks for, in words.
        metric: the one that its files' results are joined by; weighted by their sizes.
        has_thoughts: whether `--chain-of-thought` means something.
    """

    folders: tuple[str, ...]
    files: str
    specs: Callable[[Path, Wanted], list[Spec]]
    metric: str = "acc"
    has_thoughts: bool = False


_MMLU = Known(("mmlu/default",), "SUBJECT_test.csv", lambda folder, _: MMLU.specs(folder))
KNOWN: Mapping[str, Known] = {
    "cmmlu": Known(("cmmlu",), "SUBJECT.csv", lambda folder, _: CMMLU.specs(folder)),
    "mmlu_ppl": _MMLU,
    "mmlu": _MMLU,
    "gsm8k": Known(
        ("gsm8k",),
        "*.jsonl",
        lambda folder, wanted: gsm8k(folder, chain_of_thought=wanted.chain_of_thought),
        "exact_match",
        has_thoughts=True,
    ),
    "boolq": Known(("super_glue/boolq",), "*dev*.jsonl", lambda folder, _: boolq(folder)),
    "ceval": Known(("ceval",), "SUBJECT_val.csv", lambda folder, _: C_EVAL.specs(folder)),
    "bbh": Known(
        ("bbh/fewshot", "bbh/cot_fewshot"),
        "TASK.json",
        lambda folder, wanted: bbh(folder, chain_of_thought=wanted.chain_of_thought),
        "exact_match",
        has_thoughts=True,
    ),
    "agieval": Known(("agieval",), "TASK.jsonl", lambda folder, _: agieval(folder)),
    "human_eval": Known((), "*.jsonl", lambda folder, _: human_eval(folder), "pass@1"),
    "needlebench": Known(
        (),
        "needles.jsonl",
        lambda folder, wanted: needlebench(folder, wanted.tokenizer, wanted.positions),
        "score",
    ),
}


def load_upstream(wanted: Wanted) -> tuple[dict[str, Any], list[str]]:
    """The benchmarks as lm-evaluation-harness's tasks and groups, and notices for the user.

    Raises:
        UserError: a name is unknown, there are no files for it, or they cannot be read.
    """
    for name in wanted.names:
        if name not in KNOWN:
            raise UserError(f"--task {name}: expected some of {', '.join(KNOWN)}{nearest(name, list(KNOWN))}")
    if wanted.chain_of_thought and not any(KNOWN[name].has_thoughts for name in wanted.names):
        raise UserError("--chain-of-thought: only for gsm8k and bbh of --task")
    require_library()
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    home = Path(lm_eval.tasks.__file__).parent
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    notices: list[str] = []
    for name in dict.fromkeys(wanted.names):
        known = KNOWN[name]
        specs = _found(name, known, wanted)
        notices += dict.fromkeys(spec.notice for spec in specs if spec.notice)
        folders = [str(home / folder) for folder in known.folders]
        manager = TaskManager(include_path=folders, include_defaults=False)
        for key, values in load_specs(manager, [_group(name, known, specs, manager)]).items():
            loaded[key].update(values)
    if wanted.max_new_tokens is not None:
        for task in loaded["tasks"].values():
            if task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": wanted.max_new_tokens}, update=True)
    return loaded, notices


def _found(name: str, known: Known, wanted: Wanted) -> list[Spec]:
    """The tasks in the last folder that has some."""
    for folder in reversed(wanted.folders):
        if not Path(folder).is_dir():
            raise UserError(f"--task-data-path {folder}: no such folder")
        if specs := known.specs(Path(folder), wanted):
            return specs
    where = f"--task-data-path {' '.join(wanted.folders)}" if wanted.folders else "--task-data-path is not given"
    raise UserError(f"{where}: --task {name} needs a folder with {known.files}")


def _group(name: str, known: Known, specs: Sequence[Spec], manager: Any) -> Any:
    """All files of a benchmark as one group, whose result is the mean over all questions."""
    from lm_eval.api.group import Group

    if unknown := [spec.name for spec in specs if not spec.is_new and spec.name not in manager.task_index]:
        raise UserError(
            f"--task {name}: lm-evaluation-harness has no task {unknown[0]}: the file is called otherwise than its "
            f"subject{nearest(unknown[0], manager.all_subtasks)}"
        )
    joined = {"metric": known.metric, "aggregation": "mean", "weight_by_size": True}
    group = Group.from_config({"group": name, "aggregate_metric_list": [joined]})
    for spec in specs:
        # In a group the changes are made to the task of that name. Elsewhere they would be all of it.
        wrapped = spec.config() if spec.is_new else {"group": name, "task": [spec.config()]}
        (task,) = load_specs(manager, [wrapped])["tasks"].values()
        group.add(task)
    return group
