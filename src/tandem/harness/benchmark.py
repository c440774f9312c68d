"""Evaluates a model on tasks: what is asked, by all processes together, and the results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError
from tandem.harness.library import seeds

# lm-evaluation-harness's own
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "fewshot_seed": 1234}
BOOTSTRAPS = 100_000
FEW = 1000


@dataclass(frozen=True)
class Benchmark:
    """Loaded tasks, and how they are asked.

    Attributes:
        tasks: as `tandem.harness.library.load_tasks` returns them.
        num_fewshot: solved examples before each question; None for the tasks' own numbers.
        limit: of questions of each task: a number, or below 1 a share; None for all.
        allow_code: run what the model writes, where a task asks for that.
    """

    tasks: Mapping[str, Any]
    num_fewshot: int | None = None
    limit: float | None = None
    allow_code: bool = False

    def __post_init__(self) -> None:
        unsafe = [name for name, task in self.tasks["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe and not self.allow_code:
            raise UserError(f"{', '.join(unsafe)}: runs code that the model writes; --allow-code allows it")
        for task in self.tasks["tasks"].values():
            self._set_shots(task)

    def _set_shots(self, task: Any) -> None:
        """As lm-evaluation-harness does it: a task that says 0 keeps 0."""
        own = task.get_config("num_fewshot")
        if self.num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot_seed"])
        shots = task.get_config("num_fewshot")
        if shots and (available := _solved_examples(task)) < shots:
            raise UserError(
                f"--num-fewshot {shots}: {task.task_name} has {available} solved examples; give --num-fewshot "
                f"{available} or less"
            )

    def ask(self, model: Any) -> dict[str, Any]:
        """The results and the samples, as lm-evaluation-harness returns them, with its hashes of the data.

        Args:
            model: a `tandem.harness.model.TandemLM`.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.utils import hash_string

        began = time.time()
        chat = model.chat_template(True) is not None
        with seeds(SEEDS["random_seed"], SEEDS["numpy_seed"]):
            results: dict[str, Any] = evaluate(
                lm=model,
                task_dict=dict(self.tasks),
                limit=self.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=self.allow_code,
            )
        hashes = {
            name: hash_string("".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples))
            for name, samples in results["samples"].items()
        }
        return {**results, "task_hashes": hashes, "date": began, "seconds": time.time() - began}


def _solved_examples(task: Any) -> int:
    """How many can stand before a question. Where the questions themselves are the examples, none is its own.

    Of many, copies of one question are not counted: that takes long, and nobody asks for so many examples.
    """
    examples = task.fewshot_docs()
    if not len(examples) or task.fewshot_cfg.split != task.config.test_split:
        return len(examples)
    copies = max(Counter(map(repr, examples)).values()) if len(examples) <= FEW else 1
    return len(examples) - copies


def numbers(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of each task and group, without errors of the mean: `{"mmlu": {"acc": 0.5}}`.

    A metric of a filter is named METRIC,FILTER, as lm-evaluation-harness does; one without a filter METRIC.
    """
    found: dict[str, dict[str, float]] = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        found[name] = {
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
    return found
