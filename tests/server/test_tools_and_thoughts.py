"""Thoughts and calls of tools, as OpenAI's client gets them, whole and streamed, from models that follow a script."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import ScriptedWorker, Server, serving

from tandem.__main__ import main
from tandem.inference.chat import open_model
from tandem.inference.options import LoadOptions
from workspace import Workspace

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
QUESTION: Any = [{"role": "user", "content": "What is 1 + 2?"}]


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Server]:
    with serving({"toy": workspace.hf}, make_worker=ScriptedWorker) as server:
        yield server


def ask(server: Server, text: str, **options: Any) -> tuple[str | None, str | None, list[tuple[str, Any]], str]:
    """Content, thought, calls and finish reason of an answer; the streamed one must be the same."""
    server.worker.text = text  # type: ignore[attr-defined]
    options = {"model": "toy", "messages": QUESTION, **options}
    choice = server.client.chat.completions.create(**options).choices[0]
    message: Any = choice.message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
    content, thought, streamed, reason = "", "", dict[int, list[str]](), None
    for chunk in server.client.chat.completions.create(**options, stream=True):
        delta: Any = chunk.choices[0].delta
        content += delta.content or ""
        thought += getattr(delta, "reasoning_content", None) or ""
        reason = chunk.choices[0].finish_reason or reason
        for call in delta.tool_calls or []:
            name, arguments = streamed.setdefault(call.index, ["", ""])
            streamed[call.index] = [name + (call.function.name or ""), arguments + (call.function.arguments or "")]
    told = getattr(message, "reasoning_content", None)
    assert (content, thought, reason) == (message.content or "", told or "", choice.finish_reason)
    assert [(name, json.loads(arguments)) for name, arguments in streamed.values()] == calls
    return message.content, told, calls, choice.finish_reason


def test_calls_are_parsed(server: Server) -> None:
    call = ("add", {"a": 1, "b": 2})
    assert ask(server, f"I add.\n{CALL}", tools=TOOLS) == ("I add.", None, [call], "tool_calls")
    assert ask(server, f"{CALL}\n{CALL}", tools=TOOLS, tool_choice="auto") == (None, None, [call, call], "tool_calls")
    thinks = f"<think>\nhm\n</think>\n\n{CALL}"
    assert ask(server, thinks, tools=TOOLS) == (None, "hm", [call], "tool_calls")
    coder = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    assert ask(server, coder, tools=TOOLS) == (None, None, [("add", {"a": 1})], "tool_calls")


def test_what_is_no_call_stays_text(server: Server) -> None:
    broken = "<tool_call>\n{broken\n</tool_call>"
    assert ask(server, broken, tools=TOOLS) == (broken, None, [], "stop")
    assert ask(server, CALL, tools=TOOLS, tool_choice="none") == (CALL, None, [], "stop")
    assert ask(server, CALL) == (CALL, None, [], "stop")


def test_thoughts_are_apart(server: Server) -> None:
    assert ask(server, "<think>\nhm\n</think>\n\nfour") == ("four", "hm", [], "stop")
    assert ask(server, "<think>\n\n</think>\n\nfour") == ("four", None, [], "stop")
    assert ask(server, "<think>\nhm") == ("", "hm", [], "stop")
    assert ask(server, "<think>\nhm\n</think>\n\nfour", stop=["</think>"]) == ("", "hm\n", [], "stop")
    assert ask(server, "a < b") == ("a < b", None, [], "stop")


def test_each_call_has_an_id_of_its_own(server: Server) -> None:
    server.worker.text = f"{CALL}\n{CALL}"  # type: ignore[attr-defined]
    made = server.client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS)
    ids = {call.id for call in made.choices[0].message.tool_calls or []}
    assert len(ids) == 2


TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{{ '<think>\n' if enable_thinking else '' }}{% endif %}"
)


def with_template(workspace: Workspace, tmp_path: Path, template: Any) -> Path:
    """The toy's folder with another `chat_template`."""
    folder = shutil.copytree(workspace.hf, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def test_results_of_calls_reach_the_template(server: Server, workspace: Workspace, tmp_path: Path) -> None:
    """What a client sends back after a call gets the prompt that transformers writes, in Qwen3's own way."""
    folder = with_template(workspace, tmp_path, TEMPLATE)
    with serving({"toy": folder}, make_worker=ScriptedWorker) as other:
        call = ask(other, CALL, tools=TOOLS)
        assert call[2] == [("add", {"a": 1, "b": 2})]
        first = other.client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS).choices[0].message
        result = {"role": "tool", "content": "3", "tool_call_id": (first.tool_calls or [])[0].id}
        messages = [*QUESTION, first.model_dump(), result]
        other.worker.text = "3"  # type: ignore[attr-defined]
        made = other.client.chat.completions.create(model="toy", messages=messages, tools=TOOLS)
        words = '[add]<user>What is 1 + 2?<assistant>(add {"a": 1, "b": 2})<tool>3<assistant>'
        assert made.usage
        assert made.usage.prompt_tokens == len(other.model.tokenizer.encode(words))
        thinking = {"chat_template_kwargs": {"enable_thinking": True}}
        assert ask(other, "hm\n</think>\n\n3", extra_body=thinking) == ("3", "hm", [], "stop")
        for number in range(200):  # variables are not collected
            other.client.chat.completions.create(
                model="toy", messages=QUESTION, extra_body={"chat_template_kwargs": {"x": number}}
            )
        assert len(other.service.served["toy"].model.prompter.template._with_variables) <= 64  # type: ignore[attr-defined]


def test_a_template_for_tools_alone(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes conversations with tools. Of others the error names what there is, in each command."""
    names = r"none of its chat templates \(rag, tool_use\) is named default, which conversations without tools need"
    named = [{"name": "rag", "template": "R"}, {"name": "tool_use", "template": TEMPLATE}]
    folder = with_template(workspace, tmp_path, named)
    with serving({"toy": folder}, make_worker=ScriptedWorker) as other:
        assert ask(other, CALL, tools=TOOLS)[2] == [("add", {"a": 1, "b": 2})]
        made = other.client.chat.completions.create(model="toy", messages=QUESTION, tools=TOOLS)
        assert made.usage
        words = "[add]<user>What is 1 + 2?<assistant>"
        assert made.usage.prompt_tokens == len(other.model.tokenizer.encode(words))
        with pytest.raises(openai.BadRequestError, match=f"{names}; give one of them that name, or choose"):
            ask(other, "no")
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [*QUESTION, {"role": "assistant", "content": "3"}]}) + "\n")
    data = ["--input", str(rows), "--output-prefix", str(tmp_path / "out"), "--tokenizer-name-or-path", str(folder)]
    torch = [str(folder), "--ai-framework", "torch"]
    for words in (["chat", *torch], ["preprocess", *data], ["preprocess", *data, "--prompt-type", "chat_template"]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert re.search(names, told)
        assert "continued as texts" not in told
    assert main(["generate", *torch, "hi", "--max-new-tokens", "1"]) == 0
    assert re.search(f"{names}, and there is none from fine-tuning", capsys.readouterr().err)


def test_the_template_of_fine_tuning_is_used(workspace: Workspace, tmp_path: Path) -> None:
    from tandem.training.run import train

    train(workspace.settings("torch", instructions=True, save=str(tmp_path / "run"), train_iters=1, lr_warmup_iters=0))
    with serving({"run": tmp_path / "run"}) as server:
        made = server.client.chat.completions.create(model="run", messages=QUESTION, max_tokens=1)
        assert made.usage
        assert made.usage.prompt_tokens == len(
            open_model(LoadOptions(str(tmp_path / "run"))).prompt_ids("What is 1 + 2?")
        )
        with pytest.raises(openai.BadRequestError, match="takes only enable_thinking"):
            server.client.chat.completions.create(
                model="run", messages=QUESTION, extra_body={"chat_template_kwargs": {"other": 1}}
            )
