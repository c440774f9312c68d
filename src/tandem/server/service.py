"""What a server does with a request: it asks the worker, gathers what it tells, and gives up when nobody listens."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson

from tandem.errors import UserError
from tandem.inference.worker import Job, Update, Worker
from tandem.logs import log
from tandem.server.errors import ApiError, bad_request
from tandem.server.models import Served
from tandem.server.requests import Asked

OBJECTS = {"chat": ("chatcmpl", "chat.completion", "chat.completion.chunk")}
OBJECTS["completion"] = ("cmpl", "text_completion", "text_completion")


class Service:
    """Answers to requests, from one worker.

    Args:
        served: the models that the worker opens; filled when they are open.
        most: how many answers may be in the making, with those that wait.
    """

    def __init__(self, worker: Worker, served: Mapping[str, Served], most: int) -> None:
        self.worker, self.served, self._most = worker, served, most
        self._open = 0  # answers in the making

    def check_ready(self) -> None:
        """Raise ApiError while the models are not open."""
        if not self.worker.is_ready:
            raise ApiError(503, "the model is being loaded; try again soon", code="not_ready")

    def begin(self, asked: Asked) -> Generation:
        """Begin the answers to a request.

        Raises:
            ApiError: too many are in the making.
        """
        if self._open + len(asked.questions) > self._most:
            raise ApiError(503, f"{self._open} answers are being written or wait; try again later", code="overloaded")
        self._open += len(asked.questions)
        return Generation(self, asked)

    def ended(self, generation: Generation) -> None:
        self._open -= len(generation.asked.questions)


class Generation:
    """The answers to one request. `close` must be called; it gives up what is not finished."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self.asked, self._service = asked, service
        prefix, self._whole, self._chunk = OBJECTS[asked.kind]
        self._id, self._created, self._start = f"{prefix}-{uuid.uuid4().hex}", int(time.time()), time.monotonic()
        self._news: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._left = len(asked.questions)  # answers that are not finished
        self._tokens = self._shared = 0
        self._closed = False
        self._jobs: list[Job] = [self._ask(index) for index in range(self._left)]

    def _ask(self, index: int) -> Job:
        loop = asyncio.get_running_loop()

        def tell(update: Update) -> None:
            loop.call_soon_threadsafe(self._news.put_nowait, (index, update))

        return self._service.worker.ask(self.asked.questions[index], tell)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._service.ended(self)
        for job in self._jobs:
            self._service.worker.cancel(job)
        asked, seconds = self.asked, time.monotonic() - self._start
        end = "" if not self._left else ", given up"
        log.info("%s: %d tokens, then %d in %.1f s%s", asked.model, asked.prompt_tokens, self._tokens, seconds, end)

    async def _updates(self) -> AsyncIterator[tuple[int, Update]]:
        """What the worker tells, with the number of the choice, until all choices are finished.

        Raises:
            ApiError: an answer failed.
        """
        while self._left:
            index, update = await self._news.get()
            if isinstance(update.error, UserError):
                raise bad_request(str(update.error)) from None
            if update.error is not None:
                raise ApiError(500, f"the answer failed: {type(update.error).__name__}") from None
            self._tokens += len(update.tokens)
            self._shared += 0 if index % self.asked.answers else update.shared_tokens
            self._left -= update.is_last
            yield index, update

    async def whole(self) -> dict[str, Any]:
        """The answer when it is finished."""
        updates: list[list[Update]] = [[] for _ in self.asked.choices]
        async for index, update in self._updates():
            updates[index].append(update)
        choices = [choice.whole(of_choice) for choice, of_choice in zip(self.asked.choices, updates)]
        return {**self._frame(self._whole), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events while it is written."""
        usage: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}

        def event(choice: dict[str, Any]) -> bytes:
            return sse({**self._frame(self._chunk), "choices": [choice], **usage})

        try:
            for choice in self.asked.choices:
                for chunk in choice.opening():
                    yield event(chunk)
            async for index, update in self._updates():
                for chunk in self.asked.choices[index].chunks(update):
                    yield event(chunk)
        except ApiError as error:
            yield sse(error.to_dict())
            return
        if self.asked.include_usage:
            yield sse({**self._frame(self._chunk), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.asked.model}

    def _usage(self) -> dict[str, Any]:
        prompt = self.asked.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self._shared},
        }


def sse(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
