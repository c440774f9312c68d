"""`tandem generate`: files of prompts and answers, pipes, stop texts, and upstream's tasks."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tandem
from frameworks import require_framework
from tandem.__main__ import main
from tandem.cli.chat_input import line_editing, read_message
from tandem.cli.given_input import lines_of, open_input
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.inference.chat import Model, open_model
from tandem.inference.options import LoadOptions
from tandem.inference.prompts import notices, read_prompts
from tandem.inference.sampling import Sampling
from terminal import Terminal
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


TEMPLATE = (
    "{{ enable_thinking }} {{ tools | tojson }}{% for message in messages %}\n{{ message.role }}: {{ message.content }}"
    "{{ message.reasoning_content }}{{ message.tool_calls | tojson if message.tool_calls }}{% endfor %}"
    "{{ '\nassistant:' if add_generation_prompt }}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CONVERSATION = [
    {"role": "user", "content": "Sort 321."},
    {"role": "assistant", "content": "", "reasoning_content": "Well.", "tool_calls": [CALL]},
    {"role": "tool", "content": "123"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Sort 321."},
        {"prompt": "Sort 321.", "enable_thinking": False, "tools": TOOLS},
        {"messages": CONVERSATION, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}},
    ],
)
def test_the_template_gets_what_a_line_says(workspace: Workspace, tmp_path: Path, line: dict) -> None:
    """As transformers renders it; the server reads conversations in the same way."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(workspace.hf)
    tokenizer.chat_template = TEMPLATE
    model = Model(None, tokenizer, None)  # type: ignore[arg-type]
    (read,) = read_prompts(Path(written(tmp_path / "prompts.jsonl", line)), model, Sampling(), (), raw=False)
    given = {"enable_thinking": line.get("enable_thinking"), "tools": line.get("tools")}
    given = {name: value for name, value in given.items() if value is not None}
    theirs = transformers.AutoTokenizer.from_pretrained(workspace.hf).apply_chat_template(
        line.get("messages") or [{"role": "user", "content": line["prompt"]}],
        chat_template=TEMPLATE,
        add_generation_prompt=True,
        return_dict=False,
        **given,
        **line.get("chat_template_kwargs", {}),
    )
    assert list(read.question.tokens) == theirs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:2: not valid JSON"),
        ('{"text": "hi"}', 'prompts.jsonl:2: expected an object with either "prompt" or "messages"'),
        ('{"prompt": 3}', 'prompts.jsonl:2: "prompt" is not a text'),
        ('{"prompt": "hi", "seed": -1}', 'prompts.jsonl:2: "seed" is -1'),
        ('{"messages": "hi"}', "prompts.jsonl:2: field 'messages': expected a list of messages"),
        ('{"messages": [{"role": "x", "content": "hi"}]}', "prompts.jsonl:2: field 'messages', message 1: role is 'x'"),
        ('{"prompt": "hi", "chat_template_kwargs": 3}', "prompts.jsonl:2: field 'chat_template_kwargs': expected an"),
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


def test_what_is_not_taken_from_a_line_is_said(workspace: Workspace, tmp_path: Path) -> None:
    """A byte order mark is none of the first prompt."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hi", "stop": ["a"], "text": "x", "seed": 1}\n', encoding="utf-8-sig")
    model = open_model(LoadOptions(str(workspace.hf), ai_framework="torch"))
    lines = read_prompts(file, model, Sampling(), (), raw=False)
    assert [list(lines[0].question.tokens), lines[0].question.sampling.seed] == [model.prompt_ids("hi"), 1]
    unread, replaced = notices(lines)
    assert "not read from the prompts: stop. " in unread
    assert replaced.endswith("those of the answers: text")


def test_each_line_of_an_input_is_judged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python decodes many lines at once; one that is no text costs a conversation that line, and is named elsewhere."""
    content = "\ufeffone\r\n".encode() + b"t\xffo\nthree\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    lines = lines_of(open_input())
    assert next(lines) == "one"
    with pytest.raises(UserError, match=r"standard input, line 2: b't\\xffo' is not UTF-8"):
        next(lines)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    with line_editing(None, ()):
        assert [read_message() for _ in range(4)] == ["one", "", "three", None]


def test_what_contradicts_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hi", "--prompts-file", "p", "--output", str(tmp_path), "--batch-size", "0", "--dry-run"]
    assert main(["generate", "nowhere", *words]) == 2
    error = capsys.readouterr().err
    assert all(flag in error for flag in ("--prompts-file p", f"--output {tmp_path}", "--batch-size 0", "--dry-run"))


def test_options_of_the_model_are_checked_before_it_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt-type", "nope", "--enable-thinking", "maybe", "--raw", "--bf16", "--fp16"]
    assert main(["generate", "nowhere", "hi", *words]) == 2
    error = capsys.readouterr().err
    said = ("--prompt-type 'nope': expected one of", "--enable-thinking maybe: expected one of", "--raw and --prompt")
    assert all(text in error for text in (*said, "--bf16 and --fp16"))


def test_a_stop_text_ends_an_answer(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(workspace.hf), "Reverse 123.", "--temperature", "1", *SHORT]) == 0
    text = capsys.readouterr().out.partition("\n")[2].rstrip("\n")
    stop = text[2]
    assert main(["generate", str(workspace.hf), "Reverse 123.", "--temperature", "1", "--stop", stop, *SHORT]) == 0
    assert capsys.readouterr().out == f"> Reverse 123.\n{text.partition(stop)[0]}\n"


def test_a_prompt_that_is_continued_for_want_of_a_template(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is then what --raw asks for. A template, or --raw, leaves nothing to say."""
    shutil.copytree(workspace.hf, tmp_path / "hf")
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    for more, is_said in (([], True), (["--raw"], False), (["--prompt-type", "qwen3"], False)):
        assert main(["generate", str(tmp_path / "hf"), "hi", *more, *SHORT]) == 0
        assert ("no chat template" in capsys.readouterr().err) == is_said
    assert main(["generate", str(workspace.hf), "hi", *SHORT]) == 0
    assert "no chat template" not in capsys.readouterr().err


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


@pytest.mark.slow("answers")
@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size", None])
def test_several_processes_answer_a_pipe_as_one_does(workspace: Workspace, framework: str, layout: str | None) -> None:
    """Tensor ranks, stages, and two copies of the model."""

    def answered(*more: str) -> list[str]:
        words = [sys.executable, "-m", "tandem", "generate", str(workspace.hf), "--ai-framework", framework, *more]
        done = subprocess.run(
            [*words, "--max-new-tokens", "5"], input="Sort 12.\nHi\nHo\n", capture_output=True, text=True, check=True
        )
        return [line for line in done.stdout.splitlines() if "keys and values" not in line]

    assert answered("--nproc-per-node", "2", *([layout, "2"] if layout else [])) == answered()


@pytest.mark.slow("answers")
def test_prompts_are_typed_for_two_processes(workspace: Workspace, tmp_path: Path) -> None:
    """Each is answered before the next one is asked for."""
    require_framework("torch")
    model = open_model(LoadOptions(str(workspace.hf), ai_framework="torch"))
    prompts = ["Sort 12.", "Hi"]
    words = ["generate", str(workspace.hf), *SHORT, "--nproc-per-node", "2", "--tensor-model-parallel-size", "2"]
    terminal = Terminal(words, tmp_path)
    try:
        terminal.wait_for("Ctrl-D ends.\n> ")
        for prompt, answer in zip(prompts, model.generate(prompts, max_new_tokens=6)):
            terminal.type(f"{prompt}\n")
            terminal.wait_for(f"{prompt}\n")
            if prompt == prompts[0]:
                terminal.wait_for("keys and values")
            assert terminal.wait_for("\n> ").endswith(f"{answer}\n> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.program.kill()


@pytest.mark.slow("answers")
def test_python_asks_several_processes(workspace: Workspace) -> None:
    require_framework("torch")
    asked = {"ai_framework": "torch", "device": "cpu"}
    expected = tandem.load(workspace.hf, **asked).generate(["Hi", "Ho"], max_new_tokens=4, temperature=0.7)
    several = tandem.load(workspace.hf, **asked, nproc_per_node=2, tensor_model_parallel_size=2)
    assert several.generate(["Hi", "Ho"], max_new_tokens=4, temperature=0.7) == expected
    assert several.generate("Hi", max_new_tokens=4, temperature=0.7) == expected[0]
    with pytest.raises(tandem.UserError, match="--max-new-tokens 0"):
        several.generate("Hi", max_new_tokens=0)
