"""Files of models and data that are there by name only: dangling links, and pointers of Git-LFS."""

from __future__ import annotations

import os
from pathlib import Path

from tandem.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git-LFS pointer: a few lines of text in place of a large file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def check_real(path: str | Path) -> None:
    """Raise UserError, with what helps, when the content of a file lies elsewhere and is not here.

    A file that is not there at all passes: only the caller knows whether it is needed.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path}: a link to {os.readlink(path)}, which is not there: the folder was copied without the files that "
            f"it links to, or they were removed; copy it again with `cp -rL`, or download it again"
        )
    if path.is_file() and is_lfs_pointer(path):
        raise UserError(
            f"{path}: a Git-LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or download the file"
        )
