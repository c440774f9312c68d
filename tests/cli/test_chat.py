"""`tandem chat` in a terminal of its own, as a person uses it."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from frameworks import require_framework
from tandem.__main__ import main
from tandem.cli.chat_screen import OneAnswer, whole_blocks
from tandem.data.templates.messages import Message
from tandem.inference.answers import Piece
from tandem.inference.chat import Model, open_model
from tandem.inference.dialogue import Dialogue
from tandem.inference.options import LoadOptions
from tandem.inference.replies import Question
from tandem.inference.sampling import Sampling
from tandem.training.run import train
from terminal import CONTROL, Terminal
from workspace import Workspace


def test_a_conversation(workspace: Workspace, tmp_path: Path) -> None:
    """Questions, several lines, commands, Ctrl-C and Ctrl-D."""
    terminal = Terminal(["chat", str(workspace.hf), "--system", "Be brief."], tmp_path)
    try:
        assert "hf. /help lists commands, Ctrl-D ends." in terminal.wait_for(">>> ")
        terminal.type("/set max_new_tokens 7\n")
        terminal.wait_for("max_new_tokens 7")
        terminal.type("Which digit\\\nis largest?\n")
        terminal.wait_for("... ")
        assert re.search(
            r"7 tokens, [\d.]+ tokens/s, the first after [\d.]+ s, cut after 7", terminal.wait_for("(/set")
        )
        terminal.type('"""one\ntwo"""\n')
        terminal.wait_for("cut after 7 tokens")
        for command, answer in (
            ("/help", "/regenerate"),
            ("/system", "system: Be brief."),
            ("/think on", "> /think: the template of this model has no thinking mode"),
            ("/regen", "no such command; did you mean '/regenerate'"),
            ("/set top_q 3", "/set top_q: unknown; did you mean 'top_p'"),
            ("/set temperature -1", "--temperature -1.0: expected 0 or more"),
            ("/regenerate", "cut after 7 tokens"),
            (f"/save {tmp_path}/said.jsonl", "saved to"),
            ("/set max_new_tokens 100000", "max_new_tokens 100000"),
        ):
            terminal.type(f"{command}\n")
            terminal.wait_for(answer)
            terminal.wait_for(">>> ")
        terminal.type("Go on and on.\n")
        terminal.wait_for("Go on and on.")
        time.sleep(0.2)  # the line is read, and the answer takes longer than this
        terminal.interrupt("stopped")
        terminal.wait_for(">>> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.interrupt("Ctrl-D or /quit ends.")
        terminal.wait_for(">>> ")  # between two prompts the terminal itself takes Ctrl-D, and the program never sees it
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.program.kill()
    said = json.loads((tmp_path / "said.jsonl").read_text())["messages"]
    assert [message["role"] for message in said] == ["system", *("user", "assistant") * 2]
    assert [said[1]["content"], said[3]["content"]] == ["Which digit\nis largest?", "one\ntwo"]
    history = tmp_path / "tandem" / "chat_history"
    assert "Go on and on." in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.slow("answers")
def test_a_conversation_with_two_processes(workspace: Workspace, tmp_path: Path, framework: str) -> None:
    """The first one has the terminal, and Ctrl-C stops its answers. They are those of one process.

    These are the flags that the refusal of one process names.
    """
    require_framework(framework)
    words = ["chat", str(workspace.hf), "--max-new-tokens", "9", "--temperature", "0", "--ai-framework", framework]
    terminal = Terminal([*words, "--nproc-per-node", "2", "--tensor-model-parallel-size", "2"], tmp_path)
    try:
        assert "hf. /help lists commands, Ctrl-D ends." in terminal.wait_for(">>> ")
        for line in ("Reverse 12.", "And 3?"):
            terminal.type(f"{line}\n")
            terminal.wait_for("cut after 9 tokens")
            terminal.wait_for(">>> ")
        terminal.type(f"/save {tmp_path}/said.jsonl\n")
        terminal.wait_for(">>> ")
        terminal.type("/set max_new_tokens 100000\n")
        terminal.wait_for(">>> ")
        terminal.type("Go on and on.\n")
        terminal.wait_for("Go on and on.")
        time.sleep(0.2)
        terminal.interrupt("stopped")
        terminal.wait_for(">>> ")
        terminal.type("\x1ahalf a line")  # Ctrl-Z changes nothing
        terminal.wait_for("half a line")
        terminal.interrupt("Ctrl-D or /quit ends.")
        terminal.wait_for(">>> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.program.kill()
    model = open_model(LoadOptions(str(workspace.hf), ai_framework=framework))
    alone, said = Dialogue(model, Sampling(max_new_tokens=9)), json.loads((tmp_path / "said.jsonl").read_text())
    for line in ("Reverse 12.", "And 3?"):
        alone.ask(line)
        list(alone.answer())
    assert alone.to_record() == said


@pytest.mark.slow("answers")
@pytest.mark.parametrize("processes", [(), ("--nproc-per-node", "2", "--pipeline-model-parallel-size", "2")])
def test_two_models_side_by_side(workspace: Workspace, tmp_path: Path, processes: tuple[str, ...]) -> None:
    base = tmp_path / "base"
    base.symlink_to(workspace.hf)
    words = ["chat", str(workspace.hf), "--compare", str(base), "--max-new-tokens", "5", "--no-history"]
    terminal = Terminal([*words, *processes], tmp_path)
    try:
        assert "hf and base." in terminal.wait_for(">>> ")
        terminal.type("Reverse 123.\n")
        assert re.search(r"hf {20,}base", terminal.wait_for("| 5"))  # the rest may be on the next line
        terminal.type("/quit\n")
        assert terminal.end() == 0
    finally:
        terminal.program.kill()
    assert not (tmp_path / "tandem").exists()


def test_lines_of_a_pipe_are_questions(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers alone go to standard output."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Reverse 12.\n/save {tmp_path}/chat.md\n/save {tmp_path}/chat.md\n"))
    assert main(["chat", str(workspace.hf), "--max-new-tokens", "4", "--ai-framework", "torch"]) == 0
    printed = capsys.readouterr()
    text = (tmp_path / "chat.md").read_text()
    assert text.startswith("## User\n\nReverse 12.\n\n## Assistant\n\n")
    assert printed.out.rstrip("\n") == text.partition("## Assistant\n\n")[2].rstrip("\n")
    assert "chat.md: exists; choose another name" in printed.err
    assert "> keys and values: up to " in printed.err
    assert "4 tokens" in printed.err


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tuned(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model whose template has a mode without thoughts, and adapters of it."""
    root = tmp_path_factory.mktemp("tuned")
    folder = shutil.copytree(workspace.hf, root / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": THINKS}))
    lora = {"lora_target_modules": "all-linear", "lora_r": 4, "lr": 0.02, "lr_warmup_iters": 0}
    train(workspace.settings("torch", load=str(folder), save=str(root / "run"), train_iters=2, **lora))
    return str(folder), str(root / "run")


def test_adapters_and_modes_of_thinking(
    tuned: tuple[str, str], framework: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are those to the prompts that the template writes, of the model with its adapters, on PyTorch."""
    folder, adapters = tuned
    model = open_model(LoadOptions(folder, ai_framework="torch", lora_load=adapters))
    plain = open_model(LoadOptions(folder, ai_framework="torch"))

    def answers(model: Model) -> list[str]:
        asked = [
            model.prompter.prompt([Message("user", "Reverse 12.")], (), {"enable_thinking": mode}).ids
            for mode in (True, False)
        ]
        drawn = Sampling(max_new_tokens=9, temperature=1.0)
        return [reply.text for reply in model.replies([Question(ids, drawn) for ids in asked])]

    lines = ("/think on", "Reverse 12.", "/clear", "/think off", "Reverse 12.")
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    words = ["--lora-load", adapters, "--max-new-tokens", "9", "--temperature", "1", "--ai-framework", framework]
    assert main(["chat", folder, *words]) == 0
    printed = capsys.readouterr()
    expected = answers(model)
    assert printed.out == "".join(f"{answer}\n" for answer in expected)
    assert expected[0] != expected[1]
    assert not set(expected) & set(answers(plain))
    assert re.findall("thinking (on|off), from the next answer on", printed.err) == ["on", "off"]


def test_a_model_is_compared_under_a_name_of_its_own(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in one folder, and the memory of both is said."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Reverse 12.\n"))
    words = ["--compare", str(workspace.hf), "--max-new-tokens", "4", "--ai-framework", "torch"]
    assert main(["chat", str(workspace.hf), *words]) == 0
    printed = capsys.readouterr()
    of_one, _, of_other = printed.out.partition("hf-base: ")
    assert of_one == f"hf: {of_other}"
    told = re.findall(r"> (\S+): keys and values: up to [\d,]+ MB for 512 tokens, 2 times", printed.err)
    assert told == ["hf", "hf-base"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--raw"], "--raw: a conversation needs a chat template"),
        (["--tensor-model-parallel-size", "2"], "It takes 2 processes, and there are 1. Give --nproc-per-node 2"),
        (["--dry-run"], "--dry-run: nothing to check"),
        (["--compare", "/no/such"], "/no/such does not exist"),
    ],
)
def test_bad_input_is_named(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    assert main(["chat", str(workspace.hf), "--ai-framework", "torch", *words]) == 2
    assert error in capsys.readouterr().err


LONG = """# Title

A paragraph with **bold** words.

1. one

2. two

```python
def f():

    return 1
```

The end.
"""


def test_blocks_are_final_only_where_nothing_later_changes_them() -> None:
    """A list goes on after an empty line, and code has empty lines."""
    for length in range(len(LONG)):
        whole = LONG[:length][: whole_blocks(LONG[:length])]
        assert whole.count("```") != 1
        assert not whole.endswith("1. one\n\n")
    assert LONG[whole_blocks(LONG) :] == "The end.\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_stays_on_the_screen_is_the_whole_answer(size: int) -> None:
    """However it comes, and higher than the screen."""
    text = LONG * 3
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60, height=8, legacy_windows=False)
    answer = OneAnswer(console)
    answer.show(Piece("thought", "hm"))
    for first in range(0, len(text), size):
        answer.show(Piece("text", text[first : first + size]))
    answer.end()
    shown = CONTROL.sub("", screen.getvalue())
    assert shown.count("return 1") >= 3
    assert shown.rstrip().endswith("The end.")
    assert shown.startswith("hm")
