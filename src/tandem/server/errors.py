"""Errors as OpenAI's objects."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request that gets an error instead of an answer.

    Attributes:
        status: of HTTP.
        param: the field of the request that is wrong; None where it is none.
        code: what programs can tell it by.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_dict(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 500: "server_error", 503: "server_error"}
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}
        return JSONResponse(self.to_dict(), self.status, headers.get(self.status))


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def too_long(message: str, param: str | None = None) -> ApiError:
    return ApiError(413, message, param=param, code="context_length_exceeded")
