"""Answers that an evaluation already has, in a file: after a stop, the same command goes on with the others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from tandem.errors import UserError
from tandem.files.jsonl import append_line, read_json_lines, remove_damaged

IDENTITY = ("key", str)  # what every line has
MODEL = "model"  # key of the first line


class Answers:
    """The answers to requests, by a hash of what was asked, in tokens.

    Args:
        path: of the file; None keeps nothing.
        model: what is asked. A file of another model is not used.

    Raises:
        UserError: the file belongs to another model, or cannot be read or written.
    """

    def __init__(self, path: Path | None, model: Mapping[str, Any]) -> None:
        self._known: dict[str, Any] = {}
        self._file: FileIO | None = None
        self._path = path
        if path is None:
            return
        remove_damaged(path, *IDENTITY)
        if path.exists() and path.stat().st_size:
            self._read(path, model)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(path, "a")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        if not self._known:
            self.add(MODEL, dict(model))

    def _read(self, path: Path, model: Mapping[str, Any]) -> None:
        self._known = {line["key"]: line["value"] for line in read_json_lines(path, *IDENTITY)}
        other = self._known.get(MODEL) or {}
        changed = [
            name for name in {**other, **model} if other.get(name) != orjson.loads(orjson.dumps(model.get(name)))
        ]
        if changed:
            raise UserError(
                f"{path}: the answers of an unfinished evaluation, with another {', '.join(changed)}: remove the file, "
                f"or give another --output"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known) - (MODEL in self._known)

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, key: str, value: Any) -> None:
        self._known[key] = value
        if self._file is not None:
            append_line(self._file, {"key": key, "value": value})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close and remove the file: the evaluation is finished."""
        self.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def key_of(*asked: Any) -> str:
    """A hash of what is asked, which JSON can hold."""
    return hashlib.sha256(orjson.dumps(asked)).hexdigest()
