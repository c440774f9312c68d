"""The routes: OpenAI's protocol under /v1, /health, and the page at /."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem.server.errors import ApiError, bad_request
from tandem.server.page import PAGE, SECURITY_HEADERS
from tandem.server.requests import Asked, read_chat, read_completion
from tandem.server.service import Generation, Service

T = TypeVar("T")
BODY_SECONDS = 60  # that a body may take to arrive
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """What requests may be.

    Attributes:
        key: that they must have; None for no key.
        max_body: bytes.
        max_tokens: see `ServeOptions`.
        only_local: whether the address that they name must be this machine's. A page of another site, whose name leads
            to this machine, names its own.
    """

    key: str | None = None
    max_body: int = 8 << 20
    max_tokens: int = 2048
    only_local: bool = True


# Templates are rendered and tools are written by functions that call themselves for each level.
MOST_DEPTH = 100


def build_app(service: Service, limits: Limits) -> Starlette:
    """The application, over models that may still be loading."""

    async def chat(request: Request) -> Response:
        return await answer(request, lambda body: read_chat(body, service.served, limits.max_tokens))

    async def completion(request: Request) -> Response:
        return await answer(request, lambda body: read_completion(body, service.served))

    async def answer(request: Request, read: Callable[[Any], Asked]) -> Response:
        service.check_ready()
        body = await read_json(request, limits.max_body)
        generation = service.begin(await run_in_threadpool(read, body))
        if generation.asked.stream:
            return EventStream(generation)
        try:
            return json_response(await while_connected(request, generation.whole()))
        finally:
            generation.close()

    async def models(request: Request) -> Response:
        service.check_ready()
        return json_response({"object": "list", "data": [served.to_dict() for served in service.served.values()]})

    async def model(request: Request) -> Response:
        service.check_ready()
        name = request.path_params["name"]
        if name not in service.served:
            raise ApiError(404, f"the model {name!r} is not here", param="model", code="model_not_found")
        return json_response(service.served[name].to_dict())

    async def health(request: Request) -> Response:
        service.check_ready()
        return json_response({"status": "ok"})

    async def page(request: Request) -> Response:
        return Response(PAGE, media_type="text/html", headers=SECURITY_HEADERS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.worker.end, 10.0)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, limits=limits)],
        exception_handlers=dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), error_response),
        lifespan=lifespan,
    )


class Guard:
    """Lets only requests through that name this machine and have the key."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(Request(scope)) if scope["type"] == "http" else None
        await (self._app if error is None else error.response())(scope, receive, send)

    def _error(self, request: Request) -> ApiError | None:
        if self._limits.only_local and _hostname(request.headers.get("host", "")) not in LOCAL:
            return ApiError(403, f"this server answers only to {' and '.join(LOCAL)}; start it with --host 0.0.0.0")
        if self._limits.key is None or not request.scope["path"].startswith("/v1/"):
            return None
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._limits.key.encode()):
            return None
        return ApiError(
            401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
        )


class EventStream(Response):
    """Server-sent events while an answer is written. It is given up when the client goes away."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._generation.events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_connected(Request(scope, receive), stream())
        except ClientDisconnect:
            pass
        finally:
            self._generation.close()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns.

    Raises:
        ClientDisconnect: the client went away first; the work is cancelled.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Task[T], asyncio.Task[None]] = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_json(request: Request, most: int) -> Any:
    """The body of a request.

    Raises:
        ApiError: it is too large, too slow, or no JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON; send it with Content-Type: application/json")
    too_large = ApiError(413, f"the body is larger than {most:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise too_large
    body = bytearray()

    async def receive() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > most:
                raise too_large

    try:
        await asyncio.wait_for(receive(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is no valid JSON: {error}") from None
    if is_deeper(value, MOST_DEPTH):
        raise bad_request(f"the body is nested too deeply: expected at most {MOST_DEPTH} lists and objects")
    return value


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie more than `most` deep in each other.

    >>> is_deeper({"a": [1]}, 2), is_deeper({"a": [1]}, 1)
    (False, True)
    """
    level = [value]
    for _ in range(most + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [inner for part in parts for inner in part]
        if not parts:
            return False
    return True


def json_response(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


async def error_response(request: Request, error: Exception) -> Response:
    """An error as OpenAI's object."""
    if isinstance(error, ApiError):
        return error.response()
    if isinstance(error, HTTPException):  # a path or a method that does not exist
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    return ApiError(500, f"an error of the server: {type(error).__name__}").response()


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
