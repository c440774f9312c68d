"""The file of an HTML page, which is written over an earlier page, and over nothing else."""

from __future__ import annotations

from pathlib import Path

from tandem.checkpoints.publish import check_writable
from tandem.errors import UserError

_BEGINNING = b"<!doctype html>"


def check_page(path: str | Path) -> None:
    """Raise UserError when no page can be written there. Nothing is made."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, where the name of a page's file is expected")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(_BEGINNING)) != _BEGINNING:
                raise UserError(f"{path}: is there and is no page; choose another name, such as page.html")
    check_writable(path.parent)
