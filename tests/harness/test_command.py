"""`tandem evaluate --tasks` as users meet it: its files, going on after a stop, and what is wrong with a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness_tasks import Samples

import tandem
from tandem.__main__ import main
from tandem.config.parsing import from_dict
from tandem.errors import UserError
from tandem.logs import lines_of_requests
from tandem.training.evaluate_tasks import UNFINISHED, evaluate_tasks
from workspace import Workspace


def words(workspace: Workspace, task_folder: Path, *more: str) -> list[str]:
    return ["evaluate", str(workspace.hf), "--include-path", str(task_folder), "--ai-framework", "torch", *more]


def test_the_files_have_lm_evals_schema(
    workspace: Workspace, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is the same for every model is compared with lm-eval's own results."""
    pytest.importorskip("torch")
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.dummy import DummyLM
    from lm_eval.tasks import TaskManager

    output = tmp_path / "deep" / "out.json"
    command = words(workspace, task_folder, "--tasks", "toys", "--limit", "4", "--output", str(output), "--log-samples")
    assert main([*command, "--seq-length", "48", "--eval-iters", "7"]) == 0
    printed = capsys.readouterr().out
    assert "--seq-length 48 --eval-iters 7: without effect on tasks" in printed
    assert "no chat template; lm-eval" in printed
    assert printed.count("> keys and values: up to ") == 1
    assert "toy_answers" in printed
    found = json.loads(output.read_text())

    tasks = TaskManager(include_path=str(task_folder), include_defaults=False).load(["toys"])
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    theirs = evaluate(lm=DummyLM(), task_dict=tasks, limit=4, bootstrap_iters=0)
    assert theirs is not None
    samples = dict(theirs.pop("samples"))
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs.json"))
    tracker.save_results_aggregated(results=dict(theirs), samples=samples)
    (written,) = tmp_path.glob("theirs_*.json")
    theirs = json.loads(written.read_text())
    for key in ("configs", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks", "task_hashes"):
        assert found[key] == theirs[key], key
    assert set(theirs) <= set(found)
    for task, values in theirs["results"].items():
        assert values.keys() == found["results"][task].keys()
    assert found["config"]["limit"] == 4
    assert found["tandem"]["weights"]
    lines = (output.parent / "out_samples_toy_choices.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2, 3]
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "out.json",
        *sorted(f"out_samples_{t}.jsonl" for t in samples),
    ]


class Stop(Exception):
    """A stop in the middle."""


def test_a_stopped_evaluation_goes_on(workspace: Workspace, task_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    values = {"load": str(workspace.hf), "include_path": str(task_folder), "ai_framework": "torch"}
    values |= {"tasks": ["toy_choices", "toy_answers"], "log_samples": True, "tokens_per_batch": 40}

    def run(name: str, stop_after: int | None = None, **more: Any) -> tuple[Any, list[tuple[str, int, int]]]:
        seen: list[tuple[str, int, int]] = []

        def progress(kind: str, done: int, total: int) -> None:
            seen.append((kind, done, total))
            if len(seen) == stop_after:
                raise Stop

        return evaluate_tasks(from_dict({**values, **more, "output": str(tmp_path / name)}, "test"), progress), seen

    whole, all_steps = run("whole.json")
    for stop_after in (3, 2):
        with pytest.raises(Stop):
            run("out.json", stop_after)
        kept = tmp_path / f"out.json{UNFINISHED}"
        assert kept.exists()
        assert not (tmp_path / "out.json").exists()
        with open(kept, "ab") as file:  # as a kill leaves it
            file.write(b'{"key": "')
    with pytest.raises(UserError, match=r"out\.json\.unfinished: the answers of an unfinished .*weights: remove"):
        run("out.json", load=str(other_model(workspace, tmp_path)))
    finished, steps = run("out.json")
    assert len(steps) < len(all_steps)
    assert steps[0][1] > 0
    assert finished.samples == whole.samples
    assert not kept.exists()


def other_model(workspace: Workspace, tmp_path: Path) -> Path:
    """The same model with other weights."""
    from tandem.quickstart.toy_model import write_toy_model

    write_toy_model(tmp_path / "other", workspace.corpus.read_text(), seed=8)
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--tasks", "toy_choice"], "no such task; --include-path adds a folder; did you mean 'toy_choices'?"),
        (["--tasks", "no.yaml"], "--tasks no.yaml: no such file"),
        (["--tasks", "toys", "--log-samples"], "--log-samples: give --output"),
        (["--tasks", "toys", "--output", "."], "--output .: is a folder; expected the name of a file"),
        (["--tasks", "toys", "--limit", "1.5"], "--limit 1.5: expected a number of questions, or a share"),
        (["--tasks", "toys", "--enable-thinking", "false"], "--enable-thinking false: also give --apply-chat-template"),
        (["DATA", "--limit", "3"], "--include-path --limit: belongs to --tasks or --task, which are not given"),
        (["--tasks", "toys", "--max-new-tokens", "3"], "--max-new-tokens: belongs to --task"),
        (["--tasks", "toy_choices", "--num-fewshot", "6"], "--num-fewshot 6: toy_choices has 5 solved examples"),
        (["DATA", "--tasks", "toys"], "DATA and --tasks: give data or tasks"),
        (["--tasks", "toy_broken"], "--tasks toy_broken: Unable to find"),
        (["--tasks", "toy_code"], "toy_code: runs code that the model writes; --allow-code allows it"),
        (["--tasks", "toy_beams"], "task toy_beams: generation_kwargs num_beams not supported; expected some of"),
    ],
)
def test_what_is_wrong_is_named(
    workspace: Workspace,
    task_folder: Path,
    more: Sequence[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    answers = (task_folder / "answers.yaml").read_text()
    broken = answers.replace("digits.jsonl", "absent.jsonl").replace("toy_answers", "toy_broken")
    (task_folder / "broken.yaml").write_text(broken)
    (task_folder / "code.yaml").write_text(answers.replace("task: toy_answers", "task: toy_code\nunsafe_code: true"))
    beams = answers.replace("max_gen_toks: 12", "num_beams: 2").replace("toy_answers", "toy_beams")
    (task_folder / "beams.yaml").write_text(beams)
    assert main(words(workspace, task_folder, *more)) == 2
    assert named in capsys.readouterr().err


def test_without_the_library_its_name_is_said(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    assert main(["evaluate", str(workspace.hf), "--tasks", "x"]) == 2
    assert "pip install 'tandem-llm[eval]'" in capsys.readouterr().err


def test_progress_is_said_now_and_then() -> None:
    lines: list[str] = []
    progress = lines_of_requests(lines.append)
    for done in (0, 1, 2):
        progress("loglikelihood", done, 2)
    assert lines == ["> loglikelihood: 2 of 2"]


def test_python_gives_results_and_samples(
    workspace: Workspace, task_folder: Path, peer: Callable[..., Samples]
) -> None:
    """Each sample is lm-eval's own, with the same names as the command's flags."""
    found = tandem.evaluate(
        workspace.hf,
        tasks=["toy_choices", "toy_answers"],
        include_path=task_folder,
        limit=4,
        num_fewshot=1,
        ai_framework="torch",
    )
    assert found.results["n-shot"]["toy_choices"] == 1
    theirs = peer(("toy_choices", "toy_answers"), 1)
    for task, samples in found.samples.items():
        assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3]
        for mine, other in zip(samples, theirs[task]):
            assert mine["arguments"] == other["arguments"]
            assert [mine[metric] for metric in other["metrics"]] == [other[metric] for metric in other["metrics"]]
    accuracy = np.mean([sample["acc"] for sample in theirs["toy_choices"][:4]])
    assert found.results["results"]["toy_choices"]["acc,none"] == accuracy
    assert found.chat is None


def test_python_refuses_what_the_command_refuses(workspace: Workspace, task_folder: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="DATA and --tasks: give data or tasks"):
        tandem.evaluate(workspace.hf, "DATA", tasks=["toys"], include_path=task_folder)
    with pytest.raises(UserError, match="--limit: belongs to --tasks or --task"):
        tandem.evaluate(workspace.hf, "DATA", limit=3)
    with pytest.raises(UserError, match="max-new-tokens"):
        tandem.evaluate(workspace.hf, tasks=["toys"], max_new_tokens=3)
