"""What a server refuses, and what it withstands: wrong requests, clients that leave or do not read, and failures."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from scripted import running
from servers import ScriptedScheduler, ScriptedWorker, Server, serving

from tandem.inference.chat import Model, open_model
from tandem.inference.options import LoadOptions
from tandem.inference.worker import Worker
from tandem.server.app import Limits, build_app
from tandem.server.service import Service
from workspace import Workspace

QUESTION: Any = [{"role": "user", "content": "Sort 312."}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MOST_BODY = 20_000


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Server]:
    """Two answers at a time, four with those that wait."""
    limits = Limits(max_body=MOST_BODY)
    with serving({"toy": workspace.hf}, max_batch_size=2, most=6, limits=limits) as server:
        yield server


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": QUESTION, "max_tokens": 2, **fields}


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "told"),
    [
        (CHAT, body(model="other"), 404, "model", "expected one of ['toy']"),
        (CHAT, body(temprature=1), 400, "temprature", "did you mean 'temperature'?"),
        (CHAT, body(temperature=-1), 400, "temperature", "a number of at least 0; found int -1"),
        (CHAT, body(temperature="hot"), 400, "temperature", "found str 'hot'"),
        (CHAT, body(temperature=True), 400, "temperature", "found bool"),
        (CHAT, body(top_p=1.5), 400, "top_p", "from 0 to 1"),
        (CHAT, body(max_tokens=2.5), 400, "max_tokens", "whole number"),
        (CHAT, body(repetition_penalty=0), 400, "repetition_penalty", "above 0; found int 0"),
        (CHAT, body(audio={}), 400, "audio", "unknown field 'audio'"),
        (CHAT, body(n=0), 400, "n", "from 1 to 128"),
        (CHAT, body(n=129), 400, "n", "from 1 to 128"),
        (CHAT, body(stop=[1]), 400, "stop", "a list of at most 64"),
        (CHAT, body(stop=["x"] * 65), 400, "stop", "a list of at most 64"),
        (CHAT, body(stop=["x", ""]), 400, "stop", "a text that is not empty"),
        (CHAT, body(stop=""), 400, "stop", "a text that is not empty"),
        (CHAT, body(stream="yes"), 400, "stream", "true or false"),
        (CHAT, body(stream_options={"x": 1}), 400, "stream_options", "unknown ['x']"),
        (CHAT, body(top_logprobs=3), 400, "top_logprobs", "logprobs to true"),
        (CHAT, body(logprobs=True, top_logprobs=21), 400, "top_logprobs", "from 0 to 20"),
        (CHAT, body(tool_choice="required"), 400, "tool_choice", "the model itself decides"),
        (CHAT, body(tools=[1]), 400, "messages", "a list of tools"),
        (CHAT, body(response_format={"type": "json_object"}), 400, "response_format", "only texts"),
        (CHAT, body(frequency_penalty=1), 400, "frequency_penalty", "repetition_penalty"),
        (CHAT, body(logit_bias={"1": 5}), 400, "logit_bias", "does not do that"),
        (CHAT, body(max_completion_tokens=3), 400, "max_tokens", "give one of them"),
        (CHAT, {"messages": []}, 400, "messages", "a list of messages"),
        (CHAT, {}, 400, "messages", "a list of messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "message 1: role is 'robot'"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages", "expected a string"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "'image_url'"),
        (CHAT, body(messages=[{"role": "user", "content": "x" * 3000}]), 413, None, "this model takes 512 tokens"),
        (CHAT, body(max_tokens=600), 413, None, "and 600 of the answer"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "at least one token"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "token ids"),
        (COMPLETIONS, {}, 400, "prompt", "found null"),
        (COMPLETIONS, {"prompt": [[1], "x", [2.5]]}, 400, "prompt", "found list [2.5]"),
        (COMPLETIONS, {"prompt": [1, 99999]}, 400, "prompt", "token id 99999; expected 0 to"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "token id -1"),
        (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "found bool True"),
        (COMPLETIONS, {"prompt": ["x"] * 3, "n": 50}, 400, "prompt", "at most 128"),
        (COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 3}, 400, "best_of", "every answer is sent"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix", "does not do that"),
        (COMPLETIONS, {"prompt": "x", "messages": []}, 400, "messages", "unknown field"),
        (COMPLETIONS, {"prompt": [5] * 513}, 413, None, "this model takes 512 tokens"),
    ],
)
def test_wrong_requests_are_named(
    server: Server, path: str, fields: dict[str, Any], status: int, param: str | None, told: str
) -> None:
    response = httpx.post(server.url + path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert told in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b"\xff\xfe", 400),
        (b'{"messages": NaN}', 400),
        (b"[" * 10_000, 400),
        (b"1" * 19_000, 400),
        (b'{"messages": %s%s}' % (b"[" * 1000, b"]" * 1000), 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [%s1%s]}' % (b'{"a":' * 1000, b"}" * 1000), 400),
        (b" " * (MOST_BODY + 1), 413),
    ],
)
def test_bodies_that_are_no_requests(server: Server, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + CHAT, content=content, headers=headers)
    assert (response.status_code, set(response.json())) == (status, {"error"})

    def pieces() -> Iterator[bytes]:  # sent in chunks, without a length
        yield content

    assert httpx.post(server.url + CHAT, content=pieces(), headers=headers).status_code == status


def test_paths_methods_and_types_have_errors_of_the_same_form(server: Server) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", CHAT, 405), ("GET", "/v1/models/../../etc/passwd", 404)):
        response = httpx.request(method, server.url + path)
        assert (response.status_code, set(response.json()["error"])) == (status, {"message", "type", "param", "code"})
    assert httpx.post(server.url + CHAT, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    with pytest.raises(openai.NotFoundError, match="model 'x' is not here") as caught:
        server.client.models.retrieve("x")
    assert caught.value.code == "model_not_found"


def test_a_key_is_needed_and_names_of_other_sites_are_refused(workspace: Workspace) -> None:
    with serving({"toy": workspace.hf}, limits=Limits(key="secret"), make_worker=ScriptedWorker) as server:
        assert server.client.chat.completions.create(model="toy", messages=QUESTION).choices
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic secret"},
            {"authorization": "ü"},
        ):
            encoded = {name: value.encode() for name, value in headers.items()}
            response = httpx.post(server.url + CHAT, json=body(), headers=encoded)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(server.url).status_code == 200
        for host in ("evil.example", "evil.example:8000", "[", ""):
            assert httpx.get(server.url, headers={"host": host}).status_code == 403
        assert httpx.get(server.url, headers={"host": "localhost:1"}).status_code == 200


def test_requests_beyond_the_limit_wait_and_then_are_refused(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        ask = lambda _: httpx.post(server.url + CHAT, json=body(max_tokens=12), timeout=60)  # noqa: E731
        assert [answer.status_code for answer in pool.map(ask, range(6))] == [200] * 6
    answer = httpx.post(server.url + CHAT, json=body(n=7))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_place(server: Server, stream: bool) -> None:
    """Running and waiting: all of them leave, and the next one is answered at once."""
    sockets = [post(server.url, body(max_tokens=450, stream=stream)) for _ in range(5)]
    if stream:
        assert sockets[0].recv(12) == b"HTTP/1.1 200"
    wait_for(lambda: len(server.worker._jobs) == 5)
    for one in sockets:
        one.close()
    server.wait_until_idle()
    assert httpx.post(server.url + CHAT, json=body()).status_code == 200


def test_openais_client_closes_a_stream(server: Server) -> None:
    stream = server.client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=450, stream=True)
    next(iter(stream))
    stream.close()
    server.wait_until_idle()


def test_slow_readers_keep_nobody_waiting(server: Server) -> None:
    """One that reads nothing while another is answered gets everything later."""
    slow = post(server.url, body(max_tokens=80, stream=True, logprobs=True, top_logprobs=20, temperature=0))
    assert httpx.post(server.url + CHAT, json=body(), timeout=30).status_code == 200
    wait_for(lambda: not server.worker._jobs)
    time.sleep(0.1)
    text = b""
    while b"[DONE]" not in text:
        text += slow.recv(1000)
    slow.close()
    assert text.count(b'"top_logprobs"') == 80
    server.wait_until_idle()


def test_half_a_request_keeps_nobody_waiting(server: Server) -> None:
    with socket.create_connection(address(server.url)) as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n")
        assert httpx.post(server.url + CHAT, json=body()).status_code == 200


def test_no_request_touches_the_disk(server: Server) -> None:
    """Whatever names a request holds: no file is opened."""
    opened: list[str] = []
    watch = threading.Event()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and watch.is_set():
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    httpx.post(server.url + CHAT, json=body())  # whatever is imported late
    client = httpx.Client()
    client.get(server.url)
    watch.set()
    client.get(server.url)
    for name in ("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "{% include '/etc/passwd' %}"):
        client.post(server.url + CHAT, json=body(model=name))
        client.post(server.url + CHAT, json=body(messages=[{"role": "user", "content": name}]))
        client.post(server.url + CHAT, json=body(chat_template_kwargs={"documents": name, "path": name}))
        client.post(server.url + COMPLETIONS, json={"prompt": name, "stop": name, "max_tokens": 1})
        client.get(f"{server.url}/{name}")
        client.get(f"{server.url}/v1/models/{name}")
    watch.clear()
    assert opened == []


def test_nothing_is_answered_before_the_model_is_open(workspace: Workspace) -> None:
    opens = threading.Event()

    def open_late() -> dict[str, Model]:
        opens.wait()
        return {"toy": open_model(LoadOptions(str(workspace.hf), ai_framework="torch"))}

    worker = Worker(open_late)
    worker.start()
    with running(build_app(Service(worker, {}, 9), Limits())) as url:
        for answer in (httpx.get(f"{url}/health"), httpx.get(f"{url}/v1/models"), httpx.post(url + CHAT, json=body())):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert httpx.get(url).status_code == 200  # the page waits for it
        opens.set()
        wait_for(lambda: worker.is_ready)
        assert httpx.get(f"{url}/health").status_code == 200


def test_memory_is_said_and_models_share_it(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    models = {name: open_model(LoadOptions(str(workspace.hf), ai_framework="torch")) for name in ("tuned", "base")}
    size = models["base"].engine.bytes_per_cached_token()
    for model in models.values():
        model.engine.free_memory = lambda: 400 * size  # type: ignore[method-assign]
    worker = Worker(lambda: models, 3)
    with caplog.at_level("INFO", "tandem"):
        worker.start()
        worker.end(20)
    said = [f"> {name}: keys and values: up to {100 * size / 1e6:,.0f} MB for 100 tokens, 3 texts" for name in models]
    assert caplog.messages == said  # each a quarter of what is free


class Failing(ScriptedWorker):
    """A worker of which the next step fails."""

    fails = False

    def _scheduler(self, model: Model, models: int) -> Any:
        worker = self

        class Scheduler(ScriptedScheduler):
            def step(self) -> bool:
                if worker.fails:
                    worker.fails = False
                    raise MemoryError("secret words")
                return super().step()

        return Scheduler(model, lambda: self.text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_ends_its_answers_and_no_others(workspace: Workspace, stream: bool) -> None:
    with serving({"toy": workspace.hf}, make_worker=Failing) as server:
        server.worker.text, server.worker.fails = "fine", True  # type: ignore[attr-defined]
        with pytest.raises(openai.APIError, match="the answer failed: MemoryError") as caught:
            list(server.client.chat.completions.create(model="toy", messages=QUESTION, stream=stream))
        assert "secret" not in str(caught.value)
        made = server.client.chat.completions.create(model="toy", messages=QUESTION)
        assert made.choices[0].message.content == "fine"
        server.wait_until_idle()


def post(url: str, fields: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent, and nothing is read."""
    content = json.dumps(fields).encode()
    connection = socket.create_connection(address(url))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    return connection


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
