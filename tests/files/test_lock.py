"""One process at a time works in a place; the others are told which one, and what a killed one left is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.files import lock
from tandem.files.lock import BusyError, Lock, locked, publishing
from tandem.files.publish import LOCK, TEMPORARY

HOLD = """
import sys, time
from pathlib import Path
from tandem.files.lock import Lock
Lock(Path(sys.argv[1]), "there")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.05)


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_another_process_is_named_and_what_it_leaves_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with another_process(path) as other:
        with pytest.raises(BusyError) as caught:
            Lock(path, "run/mine")
        (problem,) = caught.value.problems
        assert f"run/mine is in use by process {other.pid} on {platform.node()}" in problem
        assert f"remove {path}" in problem
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert path.exists()
        taken = Lock(path, "run/mine")  # no one needs to remove anything
        assert json.loads(path.read_text())["pid"] == os.getpid()
        taken.release()
    assert not path.exists()


def test_a_lock_that_is_removed_can_be_taken_and_is_left_alone(tmp_path: Path) -> None:
    """As the error says. The first holder then does not remove the second one's file."""
    path = tmp_path / LOCK
    first = Lock(path, "there")
    path.unlink()
    second = Lock(path, "there")
    first.release()
    assert path.exists()
    second.release()
    assert not path.exists()


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("has_locks", [True, False])
def test_another_machine_is_known_by_its_signs(
    alive: bool, has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disks that do not tell machines of each other's locks, or have no locks at all."""
    path = tmp_path / LOCK
    holder = {"host": "elsewhere" if has_locks else platform.node(), "pid": 7, "since": "noon", "command": "tandem"}
    path.write_text(json.dumps(holder))
    if not has_locks:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    gone = threading.Event()

    def give_signs() -> None:
        while not gone.wait(0.01):
            os.utime(path)

    with ThreadPoolExecutor(1) as pool:
        if alive:
            pool.submit(give_signs)
        try:
            if alive:
                with pytest.raises(BusyError, match=f"process 7 on {holder['host']}"):
                    Lock(path, "there")
            else:
                Lock(path, "there").release()
        finally:
            gone.set()


def test_a_lock_gives_signs(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    held = Lock(path, "there")
    os.utime(path, (0, 0))
    deadline = threading.Event()
    while path.stat().st_mtime == 0:
        assert not deadline.wait(0.01)
    held.release()


def test_threads_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the moment when one lets go and removes the file that another has just opened."""
    monkeypatch.setattr(lock, "PATIENCE", 20.0)
    inside: list[int] = []

    def enter(number: int) -> None:
        held = Lock(tmp_path / LOCK, "there")
        inside.append(number)
        assert inside == [number]
        inside.remove(number)
        held.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(24)))
    assert not list(tmp_path.iterdir())


def test_a_locked_folder_that_stays_empty_goes(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder, "--save run"):
        assert (folder / LOCK).exists()
    assert not list(tmp_path.iterdir())
    with locked(folder, "--save run"):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, where a folder is expected"), locked(tmp_path / "file" / "run", ""):
        pass


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_two_publish_one_folder(there: bool, tmp_path: Path) -> None:
    """The second one is refused, and removes nothing of the first one's."""
    final = tmp_path / "model"
    if there:
        final.mkdir()
    with publishing(final) as work:
        (work / "config.json").write_text("first")
        with pytest.raises(BusyError, match=f"{final} is in use by process {os.getpid()}"), publishing(final):
            pass
        (work / "weights").write_text("first")
    assert {path.name for path in final.iterdir()} == {"config.json", "weights"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UserError, match="not an empty folder"), publishing(final):
        pass
    assert {path.name for path in final.iterdir()} == {"config.json", "weights"}


def test_what_another_program_publishes_meanwhile_stays(tmp_path: Path) -> None:
    final = tmp_path / "model"

    def publish() -> None:
        with publishing(final) as work:
            (work / "config.json").write_text("ours")
            final.mkdir()
            (final / "config.json").write_text("theirs")

    with pytest.raises(UserError, match="not an empty folder"):
        publish()
    assert (final / "config.json").read_text() == "theirs"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((TEMPORARY, LOCK))]
