"""The file of an HTML page. It may replace an earlier page, but no other file."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import UserError
from tandem.files.publish import check_writable

_BEGINNING = b"<!doctype html>"


def check_page(path: str | Path) -> None:
    """Raise UserError when no page can be written to `path`. Creates nothing."""
    path = Path(path)
    check_writable(path.parent)
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give the name of a file, such as page.html")
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_BEGINNING))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another name, such as page.html") from None
    if beginning not in (b"", _BEGINNING):
        raise UserError(f"{path}: exists and is not an HTML page of tandem; choose another name, such as page.html")
