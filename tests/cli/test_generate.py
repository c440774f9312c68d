"""`tandem generate`: files of prompts and answers, pipes, stop texts, and upstream's tasks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tandem.__main__ import main
from workspace import Workspace

SHORT = ("--max-new-tokens", "6", "--ai-framework", "torch")


def written(path: Path, *lines: dict | str) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_stand_in_the_order_of_the_prompts(workspace: Workspace, tmp_path: Path) -> None:
    """With their fields. A prompt, its message, and the same in another batch get one answer."""
    asked = [
        {"id": "a", "prompt": "Reverse 123."},
        {"messages": [{"role": "user", "content": "Reverse 123."}], "kept": [1, None]},
        {"prompt": "Sort 4321.", "seed": 8},
        {"prompt": "Sort 4321."},
    ]
    file = written(tmp_path / "prompts.jsonl", *asked, "")
    drawn = ("--temperature", "1.5", "--seed", "8")
    for number, size in enumerate(("1", "3")):
        out = tmp_path / "new" / f"{number}.jsonl"
        words = ["--prompts-file", file, "--output", str(out), "--batch-size", size, *drawn, *SHORT]
        assert main(["generate", str(workspace.hf), *words]) == 0
    first, second = (answers(tmp_path / "new" / f"{number}.jsonl") for number in (0, 1))
    assert first == second
    for line, answer in zip(asked, first, strict=True):
        assert list(answer) == [*line, "text", "token_ids", "finish_reason"]
        assert {name: answer[name] for name in line} == line
        assert answer["finish_reason"] == ("length" if len(answer["token_ids"]) == 6 else "stop")
    assert first[0]["token_ids"] == first[1]["token_ids"]
    assert first[2]["token_ids"] == first[3]["token_ids"]
    assert [path.name for path in (tmp_path / "new").iterdir() if path.suffix != ".jsonl"] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:2: not valid JSON"),
        ('{"text": "hi"}', 'prompts.jsonl:2: expected an object with either "prompt" or "messages"'),
        ('{"prompt": 3}', 'prompts.jsonl:2: "prompt" is not a text'),
        ('{"prompt": "hi", "seed": -1}', 'prompts.jsonl:2: "seed" is -1'),
        ('{"messages": "hi"}', 'prompts.jsonl:2: "messages" is not a list'),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    file = written(tmp_path / "prompts.jsonl", {"prompt": "hi"}, line)
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(workspace.hf), "--prompts-file", file, "--output", str(out), *SHORT]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_what_contradicts_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hi", "--prompts-file", "p", "--output", str(tmp_path), "--batch-size", "0", "--dry-run"]
    assert main(["generate", "nowhere", *words]) == 2
    error = capsys.readouterr().err
    assert all(flag in error for flag in ("--prompts-file p", f"--output {tmp_path}", "--batch-size 0", "--dry-run"))


def test_a_stop_text_ends_an_answer(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(workspace.hf), "Reverse 123.", "--temperature", "1", *SHORT]) == 0
    text = capsys.readouterr().out.partition("\n")[2].rstrip("\n")
    stop = text[2]
    assert main(["generate", str(workspace.hf), "Reverse 123.", "--temperature", "1", "--stop", stop, *SHORT]) == 0
    assert capsys.readouterr().out == f"> Reverse 123.\n{text.partition(stop)[0]}\n"


def test_tasks_ask_and_then_chat(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As upstream's program, which a script calls with the model's flags."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Sort 12.\n\nclear\nSort 3.\nq\nnever read\n"))
    flags = ["--use-mcore-models", "--spec", "mindspeed_llm.tasks.models.spec.qwen3_spec", "layer_spec", "--seed", "42"]
    assert main(["generate", "--load", str(workspace.hf), *flags, *SHORT]) == 0
    out = capsys.readouterr().out
    titles = ["Greedy Search", "Do Sample", "Beam Search", "Beam Search with sampling"]
    assert [line.strip("= ") for line in out.splitlines() if line.startswith("=====") and line.strip("=")] == titles
    assert (out.count("You:\nhow are you?"), out.count("You >> "), out.count("\nTandem:")) == (4, 5, 6)
    assert main(["generate", str(workspace.hf), "--num-layers", "3", "hi", *SHORT]) == 2
    assert "--num-layers 3 contradicts" in capsys.readouterr().err
