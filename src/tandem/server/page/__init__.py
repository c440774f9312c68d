"""The chat page: one document, read once, that fetches nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE = _read("style.css")
_SCRIPT = f"{_read('markdown.js')}\n{_read('chat.js')}"
PAGE = _read("index.html").replace("/*STYLE*/", _STYLE).replace("/*SCRIPT*/", _SCRIPT)
# The page runs its own script and no other, whatever a model writes, and asks only this server.
SECURITY_HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
