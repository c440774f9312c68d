"""The file of rows that preprocessing could not use."""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from tandem.data.tokenize import Reject
from tandem.errors import UserError


class RejectsFile:
    """`{output_prefix}.rejects.jsonl`, a line `{reason, content}` per row, published at the end if there are any.

    Attributes:
        count: rows so far.
        first_reason: of the first row; "" without one.
    """

    def __init__(self, output_prefix: str, on_bad: str) -> None:
        self.path = Path(f"{output_prefix}.rejects.jsonl")
        self.count = 0
        self.first_reason = ""
        self._stop = on_bad == "stop"
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def add(self, reject: Reject) -> None:
        """Write the row down, or raise its reason as UserError when `on_bad` is "stop"."""
        if self._stop:
            raise UserError(f"{reject.reason} (on_bad=skip leaves such rows out)")
        self.first_reason = self.first_reason or reject.reason
        self.count += 1
        content = reject.content.decode(errors="replace") if isinstance(reject.content, bytes) else reject.content
        self._file.write(orjson.dumps({"reason": reject.reason, "content": content}, default=str) + b"\n")

    def __enter__(self) -> RejectsFile:
        self._file = self._part.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if self.count:
            os.replace(self._part, self.path)  # after an error too: when nothing was kept, the file says why
            return
        self._part.unlink()
        if kind is None:
            self.path.unlink(missing_ok=True)  # it belongs to an earlier run, whose data are replaced
