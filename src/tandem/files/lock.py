"""A place in which one process at a time works. Others are told which process that is, and on which machine."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from threading import Event, Thread

from tandem.errors import UserError
from tandem.files.publish import LOCK, Publication, check_unoccupied, check_writable, recover
from tandem.logs import log

BEAT = 5.0  # a process that holds a lock changes the time of its file so often, in seconds
MISSED_BEATS = 3  # after so many without a sign, a process on another machine counts as gone
PATIENCE = 1.0  # seconds in which a process that ends may still let go


class BusyError(UserError):
    """Another process works in the same place."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    host: str
    pid: int
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        program = os.path.basename(sys.argv[0]).replace("__main__.py", "tandem")
        command = " ".join(word for word in (program, *sys.argv[1:2]) if not word.startswith("-"))  # not all its flags
        return cls(platform.node(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), command)

    def __str__(self) -> str:
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host}{command}, since {self.since}"


class Lock:
    """Holds the lock file at `path` until `release`.

    The system lets go of the lock of a process that is killed, so its file is taken over. Not all disks tell a machine
    of the locks of another one. So a process that holds a lock also gives a sign every few seconds, and a file that
    another machine left is taken over only after a while without a sign.

    Args:
        what: what is locked, as the user named it.

    Raises:
        BusyError: another process holds it. The error names the process, and how to clear what it may have left.
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what = path, what
        try:
            self._file = self._take()
            write_holder(self._file)
        except OSError as error:
            raise UserError(f"cannot write to {path.parent}: {error.strerror}") from error
        self._released = Event()
        self._thread = Thread(target=self._give_signs, daemon=True, name=f"lock of {what}")
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if self._is_in_place(self._file):
            self.path.unlink()
        self._file.close()

    def _take(self) -> FileIO:
        deadline = time.monotonic() + PATIENCE
        while True:
            file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                if time.monotonic() < deadline:
                    file.close()
                    time.sleep(PATIENCE / 10)
                    continue
                raise self._busy(file) from None
            except OSError:  # this disk has no locks: what the file says decides
                locked = False
            holder = read_holder(file)
            if holder and (holder.host != platform.node() or not locked) and self._sees_signs(holder):
                raise self._busy(file)
            if self._is_in_place(file):
                return file
            file.close()  # its process let go and removed it in between

    def _busy(self, file: FileIO) -> BusyError:
        holder = read_holder(file)
        file.close()
        return BusyError(
            f"{self._what} is in use by {holder or 'another process'}: wait for it, or choose another folder. If that "
            f"process is gone, remove {self.path}"
        )

    def _sees_signs(self, holder: Holder) -> bool:
        log.info("> %s: waiting for a sign of %s", self._what, holder)
        before = self._time_of_sign()
        for _ in range(10 * MISSED_BEATS):
            time.sleep(BEAT / 10)
            if self._time_of_sign() != before:
                return True
        return False

    def _time_of_sign(self) -> int:
        """The file's time in nanoseconds; 0 without a file. It is opened, since then network disks ask their server."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
        return 0

    def _give_signs(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # a network disk that fails for a while: other machines then see no sign
                os.utime(self._file.fileno())

    def _is_in_place(self, file: FileIO) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        return False


def write_holder(file: FileIO) -> None:
    """Write which process holds a lock into its file."""
    file.truncate(0)
    file.seek(0)
    file.write(json.dumps(asdict(Holder.this_process())).encode())


def read_holder(file: FileIO) -> Holder | None:
    """The process that wrote a lock file; None when it was not written whole."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (TypeError, ValueError):
        return None


@contextmanager
def locked(folder: str | Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made. It is removed in the end when nothing else is in it.

    Raises:
        BusyError, UserError: as `Lock`.
    """
    folder = Path(folder)
    check_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / LOCK, what)
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def check_unlocked(folder: str | Path, what: str) -> None:
    """Raise BusyError when a process has locked the folder. Nothing is made; what a killed process left is removed."""
    path = Path(folder) / LOCK
    if path.exists():
        Lock(path, what).release()


@contextmanager
def publishing(final: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """`with publishing(folder) as work:` commits when the block ends, aborts when it raises.

    Raises:
        BusyError: another process publishes this folder.
        UserError: as `Publication`.
    """
    final = Path(final)
    recover(final)
    if not replace:
        check_unoccupied(final)
    place = final if final.is_dir() and not replace else final.parent  # nothing can be put next to a mount point
    name = LOCK if place == final else f"{LOCK}-{final.name}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror}") from error
    lock = Lock(place / name, str(final))
    try:
        publication = Publication(final, replace=replace)
        try:
            yield publication.work
        except BaseException:
            publication.abort()
            raise
        publication.commit()
    finally:
        lock.release()
