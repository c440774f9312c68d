"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.errors import UserError

TEMPORARY = ".incomplete-"  # prefix of a folder that is being written


class Publication:
    """A folder under construction beside its final place.

    Write into `work`; `commit()` makes it appear under `final`, `abort()` removes it. A folder left behind by a
    killed process is removed when the same target is written again.

    Raises:
        UserError: the final folder exists and `replace` is False.
    """

    def __init__(self, final: str | Path, *, replace: bool = False) -> None:
        self.final = Path(final)
        self.replace = replace
        if not replace and self.final.exists() and (not self.final.is_dir() or any(self.final.iterdir())):
            raise UserError(f"{self.final} exists and is not an empty folder: remove it or choose another place")
        self.work = self.working_folder(self.final)
        shutil.rmtree(self.work, ignore_errors=True)
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.final.parent}: {error.strerror}") from error

    @staticmethod
    def working_folder(final: Path) -> Path:
        """Where the folder is built."""
        return final.parent / f"{TEMPORARY}{final.name}"

    def commit(self) -> None:
        sync_tree(self.work)
        old = self.final.parent / f"{TEMPORARY}old-{self.final.name}"
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.work.rename(self.final)
        sync_folder(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


@contextmanager
def publishing(final: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """`with publishing(folder) as work:` commits when the block ends, aborts when it raises."""
    publication = Publication(final, replace=replace)
    try:
        yield publication.work
    except BaseException:
        publication.abort()
        raise
    publication.commit()


def write_text_atomically(path: str | Path, text: str) -> None:
    """Replace a small file in one step, durably."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f"{TEMPORARY}{path.name}")
    with open(work, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def check_free_space(folder: str | Path, needed: int) -> None:
    """Raise UserError when the disk that will hold `folder` has less than `needed` bytes free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{folder} needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free")
