"""Servers in a thread, over toy models or over a script of tokens, and OpenAI's client for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
from scripted import running

from tandem.inference.chat import Model, open_model
from tandem.inference.options import LoadOptions
from tandem.inference.scheduler import Request
from tandem.inference.worker import Worker
from tandem.server.app import Limits, build_app
from tandem.server.models import Served
from tandem.server.service import Service


@dataclass(frozen=True)
class Server:
    """A server that answers, with its client, which does not try again."""

    url: str
    worker: Worker
    service: Service
    client: openai.OpenAI

    @property
    def model(self) -> Model:
        return next(iter(self.service.served.values())).model

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 20
        while self.worker._jobs or self.service._open:
            assert time.monotonic() < end, "answers are left over"
            time.sleep(0.01)


@contextmanager
def serving(
    folders: Mapping[str, Any],
    framework: str = "torch",
    *,
    max_batch_size: int = 16,
    most: int = 1000,
    limits: Limits | None = None,
    make_worker: Callable[..., Worker] = Worker,
) -> Iterator[Server]:
    """A server of the models in these folders, by their names."""
    served: dict[str, Served] = {}

    def open_models() -> dict[str, Model]:
        models = {name: open_model(LoadOptions(str(path), ai_framework=framework)) for name, path in folders.items()}
        served.update({name: Served(name, model) for name, model in models.items()})
        return models

    worker = make_worker(open_models, max_batch_size)
    service = Service(worker, served, most)
    worker.start()
    with running(build_app(service, limits or Limits())) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=(limits and limits.key) or "none", max_retries=0)
        while not worker.is_ready:
            assert worker.failure is None, worker.failure
            time.sleep(0.01)
        yield Server(url, worker, service, client)
        client.close()


class ScriptedScheduler:
    """Answers each request with the same text, a token in each step."""

    notice = "a script"

    def __init__(self, model: Model, text: Callable[[], str]) -> None:
        self._encode, self._text = model.tokenizer.encode, text
        self._left: dict[Request, list[int]] = {}

    def submit(self, prompt: Any, sampling: Any, stop_ids: Any, **_: Any) -> Request:
        request = Request(list(prompt), sampling, stop_ids)
        self._left[request] = self._encode(self._text())
        return request

    def step(self) -> bool:
        for request, left in list(self._left.items()):
            if left:
                request.tokens.append(left.pop(0))
                request.logprobs.append(-1.0)
            else:
                request.finish_reason = "stop"
                del self._left[request]
        return bool(self._left)

    def cancel(self, request: Request) -> None:
        self._left.pop(request, None)
        request.finish_reason = "cancelled"

    def close(self) -> None:
        self._left.clear()


class ScriptedWorker(Worker):
    """A worker whose models write `text`."""

    text = ""

    def _scheduler(self, model: Model, models: int) -> Any:
        return ScriptedScheduler(model, lambda: self.text)
