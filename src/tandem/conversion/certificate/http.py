"""Asking a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tandem.errors import UserError

MOST_BYTES = 64 << 20  # of an answer
SAID = 300  # characters of a server's error that are shown


class Refused(Exception):
    """The server answered with an error: it does not know the path, or not what was asked.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:SAID]}")
        self.status = status


class Lost(Exception):
    """Nobody answers, or the key is refused. No `UserError`: that is a ValueError, as a malformed answer gives."""


class Server:
    """A server, by its address with or without `/v1`.

    Raises:
        UserError: the address is none.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--url {url}: expected an address such as http://127.0.0.1:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.root = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._key, self._timeout = api_key, timeout

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises as `post`."""
        return self._send(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers a JSON body.

        Raises:
            Refused: the server answers with an error, or not with JSON.
            Lost: nobody answers, or the key is refused.
        """
        return self._send(path, json.dumps(body).encode())

    def _send(self, path: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.root + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                content = answer.read(MOST_BYTES)
        except urllib.error.HTTPError as error:
            text = error.read(MOST_BYTES).decode("utf-8", "replace")
            if error.code in (401, 403):
                raise Lost(
                    f"--url {self.root}: the server refuses the key (HTTP {error.code}): give --api-key"
                ) from None
            raise Refused(error.code, text) from None
        except (OSError, ValueError) as error:  # ValueError: an answer that is no HTTP
            reason = getattr(error, "reason", error)
            raise Lost(f"--url {self.root}: no answer: {reason}. Is the server running?") from None
        try:
            return json.loads(content)
        except ValueError:
            raise Refused(200, f"{path} is no JSON: {content[:80]!r}") from None
