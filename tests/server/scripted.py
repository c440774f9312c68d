"""A server with the real page, whose models answer from a script, with `messages` as the page sent them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tandem.server.page import PAGE, SECURITY_HEADERS
from tandem.server.service import sse


class Script:
    """What the models say next.

    Attributes:
        text, thought: of every answer, in pieces of `size` characters.
        pause: seconds between pieces.
        bodies: the requests that came.
        gone: how many answers were given up by the page.
        key: that requests must have.
    """

    def __init__(self, *names: str) -> None:
        self.names, self.text, self.thought, self.size, self.pause = names, "", "", 7, 0.0
        self.key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.gone = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", lambda _: Response(PAGE, media_type="text/html", headers=SECURITY_HEADERS)),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "the API key is missing or wrong"}}, 401)
        return JSONResponse({"data": [{"id": name, "max_model_len": 40960} for name in self.names]})

    async def _answer(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.bodies.append(body)
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        count = 0
        try:
            for name, text in (("reasoning_content", self.thought), ("content", self.text)):
                for begin in range(0, len(text), self.size):
                    count += 1
                    yield _chunk({name: text[begin : begin + self.size]})
                    await asyncio.sleep(self.pause)
        except asyncio.CancelledError:
            self.gone += 1
            raise
        yield _chunk({}, "stop")
        yield sse({"choices": [], "usage": {"completion_tokens": count}})
        yield b"data: [DONE]\n\n"


def _chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
    return sse({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None})


@contextmanager
def running(app: Any) -> Any:
    """The address of an application that answers in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
