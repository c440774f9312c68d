"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tandem.errors import UserError

LOCK = ".lock"  # in a folder, or with the name of a folder before it: `tandem.files.lock`
TEMPORARY = ".incomplete-"  # prefix of a folder that is being written
INSIDE = f"{TEMPORARY}contents"  # what is written inside an empty folder that was there before
WHOLE = f"{TEMPORARY}whole"  # the same, flushed: nothing is missing but moving its files up
DESCRIPTIONS = (".json", ".txt")  # readers recognise a folder by such a file: these are moved last


class Publication:
    """A folder under construction.

    Write into `work`. Then `commit()` makes it appear under `final`, and `abort()` removes it.

    `work` lies next to `final`. If `final` is an empty folder already, `work` lies inside it, because nothing can be
    renamed to a mount point. What a killed process left behind is removed, or finished, by `recover`: when the same
    folder is next written or read.

    Args:
        replace: `final` may exist, and is then replaced; otherwise it must be absent or empty.

    Raises:
        UserError: the final folder exists and `replace` is False, or nothing can be written there.
    """

    def __init__(self, final: str | Path, *, replace: bool = False) -> None:
        self.final, self._replace = Path(final), replace
        recover(self.final)
        if not replace:
            check_unoccupied(self.final)
        self._inside = not replace and self.final.exists()
        self.work = self.final / INSIDE if self._inside else self.working_folder(self.final)
        shutil.rmtree(self.work, ignore_errors=True)
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.work.parent}: {error.strerror}") from error

    @staticmethod
    def working_folder(final: Path) -> Path:
        """Where a folder is built: next to its final place."""
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
            if not self._replace:
                self._check_still_unoccupied()
            self.final.rename(_old_folder(self.final))
        self.work.rename(self.final)
        sync_folder(self.final.parent)
        shutil.rmtree(_old_folder(self.final), ignore_errors=True)

    def _check_still_unoccupied(self) -> None:
        """Raise UserError when another program has written the final folder meanwhile."""
        try:
            check_unoccupied(self.final)
        except UserError:
            self.abort()
            raise


def final_place(path: str | Path) -> Path:
    """Where a file of a folder under construction will be in the end. Any other path stays as it is.

    >>> final_place("/data/.incomplete-iter_0000010/index.json")
    PosixPath('/data/iter_0000010/index.json')
    """
    parts = (part.removeprefix(TEMPORARY) for part in Path(path).parts if part not in (INSIDE, WHOLE))
    return Path(*parts)


def recover(final: Path) -> None:
    """Finish publishing `final`, if a process was killed while it did so.

    Several processes may call this at the same time.

    Raises:
        UserError: files cannot be moved into place.
    """
    try:
        if (final / WHOLE).is_dir():
            _move_up(final)
        if not _old_folder(final).is_dir():
            return
        if final.exists():  # it was being removed
            shutil.rmtree(_old_folder(final), ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process was quicker
                _old_folder(final).rename(final)
    except OSError as error:
        raise UserError(
            f"{final}: a process was killed while it published this folder. What it left ({TEMPORARY}*) "
            f"cannot be put in place: {error.strerror}"
        ) from error


def _old_folder(final: Path) -> Path:
    """Where the former `final` waits until the new one is in place."""
    return final.parent / f"{TEMPORARY}old-{final.name}"


def check_unoccupied(final: Path) -> None:
    """Raise UserError when anything is there that a user would miss. Such a thing is not `lost+found`, which file
    systems make, nor what a process that is still writing puts there."""
    ours = (INSIDE, LOCK, "lost+found")
    if any(path.name not in ours for path in final.iterdir()) if final.is_dir() else final.exists():
        raise UserError(f"{final} exists and is not an empty folder: remove it or choose another place")


def _move_up(final: Path) -> None:
    """Move everything out of the folder WHOLE in `final`."""
    whole = final / WHOLE
    for path in sorted(whole.iterdir(), key=lambda path: path.suffix in DESCRIPTIONS):
        with suppress(FileNotFoundError):  # another process was quicker
            path.rename(final / path.name)
    with suppress(FileNotFoundError):
        whole.rmdir()
    sync_folder(final)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Replace a small file in one step, durably."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines_atomically(path, [text.encode()])


def write_lines_atomically(path: Path, lines: Iterable[bytes]) -> None:
    """Replace a file in one step, durably. The lines may come from the file itself."""
    work = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(work, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
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


def check_writable(folder: str | Path, flag: str | None = None) -> None:
    """Raise UserError when `folder` is not there and cannot be made, or cannot be written to. Nothing is made.

    Args:
        flag: that names the folder.
    """
    place, given = nearest_folder(folder), f"{flag} {folder}" if flag else folder
    if not place.is_dir():
        raise UserError(f"{given}: {place} is a file, where a folder is expected: choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{given}: {place} cannot be written to: choose another folder, or have it made writable")


def check_free_space(folder: str | Path, needed: int, flag: str | None = None) -> None:
    """Raise UserError when the disk that will hold `folder` has less than `needed` bytes free.

    Args:
        flag: that names the folder.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < needed:
        raise UserError(
            f"{f'{flag} ' if flag else ''}{final_place(folder)} needs {needed / 1e6:,.0f} MB and the disk has "
            f"{free / 1e6:,.0f} MB free: make room, or choose a folder on another disk"
        )


def nearest_folder(folder: str | Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return place
