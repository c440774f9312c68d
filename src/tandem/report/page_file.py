"""The file of an HTML page, which is written over an earlier page, and over nothing that is none."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import UserError
from tandem.files.publish import check_writable

_BEGINNING = b"<!doctype html>"


def check_page(path: str | Path) -> None:
    """Raise UserError when no page can be written there. Nothing is made."""
    path = Path(path)
    check_writable(path.parent)
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path}: is no file, where the name of a page's file is expected")
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_BEGINNING))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another name, such as page.html") from None
    if beginning not in (b"", _BEGINNING):
        raise UserError(f"{path}: is there and is no page; choose another name, such as page.html")
