"""`tandem serve` as a process: what it says, how it ends, what it refuses, and how much memory it takes in the end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from frameworks import require_framework
from tandem.__main__ import main
from tandem.inference.chat import open_model
from tandem.inference.options import LoadOptions
from tandem.training.run import train
from workspace import Workspace, make_mixture

READY = re.compile(r"ready\. The page: (http://\S+)/ ")


@contextmanager
def served(*words: str, framework: str = "torch") -> Iterator[tuple[str, subprocess.Popen[str], list[str]]]:
    """The address, the process and the lines of a server, when it is ready."""
    command = [sys.executable, "-m", "tandem", "serve", *words, "--port", "0", "--ai-framework", framework]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines: list[str] = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if match := READY.search(line):
                    break
            else:
                pytest.fail("".join(lines))
            reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
            reader.start()
            yield match.group(1), process, lines
            process.wait(60)
            reader.join()
        finally:
            process.kill()


@contextmanager
def begun(address: str, body: dict) -> Iterator[Callable[[], str]]:
    """A request that the server has read. Calling it waits for the answer's text."""
    with httpx.stream("POST", address, json={**body, "stream": True}, timeout=60) as answer:

        def text() -> str:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
            assert events.pop() == "[DONE]"
            choices = [json.loads(event)["choices"][0] for event in events]
            return "".join(choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices)

        yield text


@pytest.mark.slow("signals")
def test_sigterm_finishes_what_runs_and_what_waits(workspace: Workspace) -> None:
    """One answer at a time: one runs, one waits, a third comes too late."""
    body = {"messages": [{"role": "user", "content": "Sort 312."}], "max_tokens": 200, "temperature": 0}
    with served(str(workspace.hf), "--max-batch-size", "1") as (url, process, lines):
        address = f"{url}/v1/chat/completions"
        with begun(address, body) as first, begun(address, body) as second:
            process.send_signal(signal.SIGTERM)
            assert first() == second() != ""
        with pytest.raises(httpx.ConnectError):
            httpx.post(address, json=body, timeout=60)
    assert process.returncode == 0
    assert "> SIGTERM: finishing what runs\n" in lines
    assert len([line for line in lines if line.startswith("hf: ")]) == 2


@pytest.mark.slow("answers")
@pytest.mark.parametrize("split", [(), ("--tensor-model-parallel-size", "2", "--nproc-per-node", "2")])
def test_base_and_tuned_are_two_models(split: tuple[str, ...], workspace: Workspace, tmp_path: Path) -> None:
    """The same weights with adapters and without: `--lora-load` belongs to the first only.

    Also where two processes hold both. Questions to both at a time get what each gets alone.
    """
    lora = {"lora_target_modules": ["linear_qkv"], "lora_r": 4, "lr": 0.5, "lr_warmup_iters": 0}
    train(workspace.settings("torch", save=str(tmp_path / "tuned"), train_iters=2, **lora))
    words = (str(workspace.hf), "--lora-load", str(tmp_path / "tuned"), "--compare", str(workspace.hf))
    with served(*words, *split) as (url, process, _), ThreadPoolExecutor(4) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tuned", "hf"]

        def ask(name: str) -> str:
            done = client.completions.create(model=name, prompt="Sort 312.", temperature=0, max_tokens=12)
            return str(done.choices[0].text)

        texts = [ask("tuned"), ask("hf")]
        assert texts[0] != texts[1]
        assert list(pool.map(ask, ["tuned", "hf"] * 4)) == texts * 4
        process.send_signal(signal.SIGINT)
    assert process.returncode == (128 + signal.SIGINT if split else 0)
    for adapters, text in zip((str(tmp_path / "tuned"), None), texts):
        model = open_model(LoadOptions(str(workspace.hf), ai_framework="torch", lora_load=adapters, raw=True))
        assert model.generate("Sort 312.", temperature=0.0, max_new_tokens=12) == text


@pytest.mark.slow("answers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_serve_one_model(workspace: Workspace, framework: str, number: signal.Signals) -> None:
    """The answer is that of one process on PyTorch, and a signal finishes it, also as soon as the model is open."""
    words = (str(workspace.hf), "--tensor-model-parallel-size", "2", "--nproc-per-node", "2")
    body = {"prompt": "Sort 312.", "max_tokens": 60, "temperature": 0}
    with served(*words, framework=framework) as (url, process, lines), begun(f"{url}/v1/completions", body) as answer:
        process.send_signal(number)
        text = answer()
    assert any(line.startswith(f"> {number.name}: finishing what runs") for line in lines)
    assert process.returncode == 128 + number
    model = open_model(LoadOptions(str(workspace.hf), ai_framework="torch", raw=True))
    assert model.generate("Sort 312.", temperature=0.0, max_new_tokens=60) == text


@pytest.mark.slow("answers")
def test_ranks_that_share_experts_serve_them_with_adapters(workspace: Workspace, tmp_path: Path) -> None:
    """On MindSpore. Of each prompt, the answer is that of one process on PyTorch, wherever it is kept."""
    require_framework("mindspore")
    mixture, tuned = make_mixture(workspace.hf, tmp_path / "moe"), tmp_path / "tuned"
    lora = {"lora_target_modules": "all-linear", "lora_r": 4, "lr": 0.1, "lr_warmup_iters": 0}
    train(workspace.settings("torch", load=str(mixture), save=str(tuned), train_iters=2, **lora))
    words = (str(mixture), "--lora-load", str(tuned), "--expert-model-parallel-size", "2", "--nproc-per-node", "2")
    prompts = ["Sort 312.", "Reverse 123.", "Which digit of 90 is largest?"]
    with served(*words, framework="mindspore") as (url, process, _):
        body = {"prompt": prompts, "max_tokens": 12, "temperature": 0}
        choices = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        process.send_signal(signal.SIGTERM)
    texts = [choice["text"] for choice in choices]
    for adapters, is_same in ((str(tuned), True), (None, False)):
        model = open_model(LoadOptions(str(mixture), ai_framework="torch", lora_load=adapters, raw=True))
        assert (model.generate(prompts, temperature=0.0, max_new_tokens=12) == texts) == is_same


def test_what_cannot_be_served_is_said_at_once(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def error(*words: str) -> str:
        assert main(["serve", *words]) == 2
        return capsys.readouterr().err

    assert f"{tmp_path / 'none'} does not exist" in error(str(tmp_path / "none"), "--port", "0")
    assert "--port 70000: expected 0 to 65535" in error(str(workspace.hf), "--port", "70000")
    assert "expected 2 different names" in error("A", "--compare", "B", "--served-model-name", "x", "x")
    split = ("--tensor-model-parallel-size", "2")
    told = "takes 2 processes, and there are 1. Give --nproc-per-node 2\n"
    assert told in error(str(workspace.hf), *split)
    assert "--host no.such.host.invalid" in error(str(workspace.hf), "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: Address already in use; choose another" in error(str(workspace.hf), "--port", port)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "tandem serve needs starlette and uvicorn: pip install 'tandem-llm[serve]'" in error("A")


def test_more_processes_than_a_copy_takes_are_told_what_splits_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    def told(*words: str) -> str:
        assert main(["serve", "MODEL", *words]) == 2
        return capsys.readouterr().err

    tensor, experts = "--tensor-model-parallel-size", "--expert-model-parallel-size"
    assert told().endswith(
        f"takes 1 process, and there are 4. Give --nproc-per-node 1, or {tensor} 4 to split the model over 4, or "
        f"{experts} 4 to split the model over 4, where it has experts\n"
    )
    assert f"Give --nproc-per-node 2, or {tensor} 4 to" in told(tensor, "2")
    assert told("--pipeline-model-parallel-size", "3").endswith("Give --nproc-per-node 3\n")
    shared = told(tensor, "2", "--expert-tensor-parallel-size", "1")  # where tensor ranks share experts, 2 are one copy
    assert tensor in shared
    assert experts not in shared


@pytest.mark.slow("answers")
def test_memory_does_not_grow(workspace: Workspace) -> None:
    """1,000 requests of all kinds and lengths, many given up or wrong, after 150 that fill what is kept once."""
    with served(str(workspace.hf), "--max-batch-size", "1") as (url, process, _):
        with httpx.Client(timeout=60) as client:

            def ask(number: int) -> None:
                message = {"role": "user", "content": f"Sort {100 + number % 9}."}
                body = {"messages": [message], "max_tokens": 1 + number % 2, "seed": number, "temperature": 1}
                body["stop"] = [str(number)]
                body["chat_template_kwargs"] = {"number": number}
                if number % 10 == 0:
                    client.post(f"{url}/v1/chat/completions", json={**body, "number": number})
                elif number % 3 == 0:
                    request = {**body, "stream": True, "max_tokens": 100, "logprobs": True}
                    with client.stream("POST", f"{url}/v1/chat/completions", json=request) as stream:
                        next(stream.iter_bytes())
                elif number % 3 == 1:
                    fields = {"prompt": [[5] * (number % 97 + 1)], "max_tokens": 1, "echo": True, "logprobs": 5}
                    client.post(f"{url}/v1/completions", json=fields)
                else:
                    client.post(f"{url}/v1/chat/completions", json=body)

            for number in range(150):
                ask(number)
            before = resident(process.pid)
            for number in range(150, 1150):
                ask(number)
            after = resident(process.pid)
        process.send_signal(signal.SIGTERM)
    print(json.dumps({"MB before": before / 1e6, "MB after": after / 1e6}))
    assert after - before < 8e6  # 8 KB for each request would be a leak


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
