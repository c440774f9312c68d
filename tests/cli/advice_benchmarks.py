"""Benchmarks that are refused, and what follows: a table of test_advice.py. Tasks are those of tests/harness."""

from __future__ import annotations

import json
from pathlib import Path

from advice import Case, add, changed, give, give_value, leave_out, without

TASKS = Path(__file__).parents[1] / "harness" / "tasks"
EVALUATE = "evaluate {hf} --include-path {tasks} --device cpu --ai-framework torch --limit 2"
CHOICES = f"{EVALUATE} --tasks toy_choices"


def make_tasks(folder: Path) -> None:
    """They name their data by absolute paths. One of them runs code."""
    folder.mkdir()
    texts = {path.name: path.read_text(encoding="utf-8").replace("FOLDER", str(folder)) for path in TASKS.iterdir()}
    texts["code.yaml"] = texts["answers.yaml"].replace("task: toy_answers", "task: toy_code\nunsafe_code: true")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def make_gsm8k(folder: Path) -> None:
    folder.mkdir()
    row = {"question": "2 + 2?", "answer": "It is 4.\n#### 4"}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


CASES = {
    "a task that runs code": Case(
        f"{EVALUATE} --tasks toy_code", "runs code that the model writes; (--allow-code) allows it", add("--allow-code")
    ),
    "too many solved examples": Case(f"{CHOICES} --num-fewshot 7", r"give (--num-fewshot) (\d) or less", give),
    "a task that compares answers, of a model that thinks": Case(
        f"{CHOICES} --apply-chat-template --prompt-type qwen3 --enable-thinking true",
        "compare how likely given answers are, .* give (--enable-thinking) (false)$",
        give,
    ),
    "a conversation without a template in a task": Case(
        changed(CHOICES.replace("{hf}", "{untemplated}"), "--limit", "1") + " --apply-chat-template",
        "has no chat template .*; (--prompt-type) chooses one",
        give_value("qwen3"),
    ),
    "a way to ask, without a template": Case(
        f"{CHOICES} --enable-thinking false",
        "also give (--apply-chat-template)",
        add("--apply-chat-template --prompt-type qwen3"),
    ),
    "samples without a place": Case(
        f"{CHOICES} --log-samples", r"give (--output) FILE\.json", give_value("{new}.json")
    ),
    "tasks for training": Case(
        without(CHOICES, "--tasks") + " --eval-tasks toy_choices",
        "belongs to training: give --tasks",
        lambda line, _: line.replace("--eval-tasks", "--tasks"),
    ),
    "tasks of two kinds": Case(
        f"{CHOICES} --task gsm8k --task-data-path {{gsm8k}}",
        "--tasks and --task: give one of them",
        lambda line, _: without(without(line, "--task"), "--task-data-path"),
    ),
    "data and tasks": Case(
        CHOICES.replace("{hf}", "{hf} {text}"),
        "give data or tasks, each in its own command",
        lambda line, _: [CHOICES, "evaluate {hf} {text} --device cpu --seq-length 32 --eval-iters 1"],
    ),
    "a task of upstream without files": Case(
        "evaluate {hf} --device cpu --task gsm8k",
        r"--task-data-path is not given: --task gsm8k needs a folder with",
        add("--task-data-path {gsm8k} --max-new-tokens 2"),
    ),
    "a task in another folder": Case(
        f"{without(CHOICES, '--include-path')} --include-path {{elsewhere}}",
        "--tasks toy_choices: no such task; (--include-path) adds a folder",
        give_value("{tasks}"),
    ),
    "a task without a tokenizer": Case(
        CHOICES.replace("{hf}", "{bare}"),
        "give its folder with --tokenizer-name-or-path",
        add("--tokenizer-name-or-path {hf}"),
    ),
    "what belongs to tasks of upstream": Case(
        f"{CHOICES} --max-new-tokens 3", "--max-new-tokens: belongs to --task$", leave_out("--max-new-tokens")
    ),
}
