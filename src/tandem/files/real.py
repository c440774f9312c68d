"""Paths of models and data that are not what they seem: absent, dangling links, pointers of Git-LFS."""

from __future__ import annotations

import os
from pathlib import Path

from tandem.errors import UserError, nearest

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git-LFS pointer: a few lines of text in place of a large file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def check_folder(path: str | Path, expected: str) -> None:
    """Raise UserError when a path is no folder. `expected` says what should be there, as `a folder with a tokenizer`.

    A file inside of a folder that is not there would be a misleading thing to name.
    """
    check_real(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: expected {expected}{near_names(path)}")
    if not os.path.isdir(path):
        raise UserError(f"{path} is a file: expected {expected}")


def near_names(path: str | Path) -> str:
    """The end of an error about a path that does not exist: a name in its folder that is nearly the same, or ""."""
    path = Path(path)
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""


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
