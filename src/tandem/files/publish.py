"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tandem.errors import UserError

TEMPORARY = ".incomplete-"  # prefix of a folder that is being written
INSIDE = f"{TEMPORARY}contents"  # what is written inside an empty folder that was there before
WHOLE = f"{TEMPORARY}whole"  # the same, flushed: nothing is missing but moving its files up
DESCRIPTIONS = (".json", ".txt")  # readers recognise a folder by such a file: these are moved last


class Publication:
    """A folder under construction.

    Write into `work`; `commit()` makes it appear under `final`, `abort()` removes it. `work` lies beside `final`, or,
    where `final` is an empty folder already (a mount point, perhaps, which nothing can be renamed to), inside it. What
    a killed process left behind is removed, or finished, when the same folder is next written or read (`recover`).

    Args:
        replace: `final` may exist and is exchanged; otherwise it must be absent or empty.

    Raises:
        UserError: the final folder exists and `replace` is False, or nothing can be written there.
    """

    def __init__(self, final: str | Path, *, replace: bool = False) -> None:
        self.final = Path(final)
        recover(self.final)
        if not replace and _is_occupied(self.final):
            raise UserError(f"{self.final} exists and is not an empty folder: remove it or choose another place")
        self._inside = not replace and self.final.exists()
        self.work = self.final / INSIDE if self._inside else self.working_folder(self.final)
        shutil.rmtree(self.work, ignore_errors=True)
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.work.parent}: {error.strerror}") from error

    @staticmethod
    def working_folder(final: Path) -> Path:
        """Where a folder is built beside its final place."""
        return final.parent / f"{TEMPORARY}{final.name}"

    def commit(self) -> None:
        sync_tree(self.work)
        if self._inside:
            self.work.rename(self.final / WHOLE)
            _move_up(self.final)
        else:
            self._exchange()

    def abort(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _exchange(self) -> None:
        if self.final.exists():
            self.final.rename(_aside(self.final))
        self.work.rename(self.final)
        sync_folder(self.final.parent)
        shutil.rmtree(_aside(self.final), ignore_errors=True)


def final_place(path: str | Path) -> Path:
    """Where something below a folder under construction will be; any other path as it is."""
    parts = (part.removeprefix(TEMPORARY) for part in Path(path).parts if part not in (INSIDE, WHOLE))
    return Path(*parts)


def recover(final: Path) -> None:
    """Finish what a process that was killed while it published `final` had begun.

    Several processes may do so at once.

    Raises:
        UserError: the disk does not let it.
    """
    try:
        if (final / WHOLE).is_dir():
            _move_up(final)
        if not _aside(final).is_dir():
            return
        if final.exists():  # it was being removed
            shutil.rmtree(_aside(final), ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process was quicker
                _aside(final).rename(final)
    except OSError as error:
        raise UserError(
            f"{final}: a process was killed while it published this folder, and what it left "
            f"({TEMPORARY}*) cannot be put in place: {error.strerror}"
        ) from error


def _aside(final: Path) -> Path:
    """Where the former `final` waits until the new one is in place."""
    return final.parent / f"{TEMPORARY}old-{final.name}"


def _is_occupied(folder: Path) -> bool:
    """Whether anything is there that a user would miss; `lost+found` is a disk's own."""
    if not folder.is_dir():
        return folder.exists()
    return any(path.name not in (INSIDE, "lost+found") for path in folder.iterdir())


def _move_up(final: Path) -> None:
    """Move everything out of the folder WHOLE in `final`."""
    whole = final / WHOLE
    for path in sorted(whole.iterdir(), key=lambda path: path.suffix in DESCRIPTIONS):
        with suppress(FileNotFoundError):  # another process was quicker
            path.rename(final / path.name)
    with suppress(FileNotFoundError):
        whole.rmdir()
    sync_folder(final)


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


def check_writable(folder: str | Path) -> None:
    """Raise UserError when `folder` is not there and cannot be made, or cannot be written to. Nothing is made."""
    place = _nearest(folder)
    if not place.is_dir():
        raise UserError(f"{folder}: {place} is a file, where a folder is expected: choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {place} cannot be written to: choose another folder, or have it made writable")


def check_free_space(folder: str | Path, needed: int) -> None:
    """Raise UserError when the disk that will hold `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed:
        raise UserError(
            f"{final_place(folder)} needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free"
        )


def _nearest(folder: str | Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return place
