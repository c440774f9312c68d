"""A process in a job that `tandem.launch.supervisor` supervises: where its output goes, and how it ended.

The supervisor sets TANDEM_JOB to a folder. Each process writes its output and its pid there. When it ends by itself, it
also writes a record. Without TANDEM_JOB, a process only makes sure that it ends when its launcher ends.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tandem.launch.world import World, is_one_of_several, is_scheduler

JOB = "TANDEM_JOB"
SUPERVISOR = "TANDEM_SUPERVISOR"  # pid of the supervisor
NODE = "TANDEM_NODE"  # number of this machine in the job
# How far a rank has come: it waits for the other ranks, or all have met. Only then can it have anything to save.
JOINING, JOINED = "joining", "joined"
# The exit code of a rank that SIGTERM ended before it could save or had an error to tell.
TERMINATED = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = ("MS_ROLE", "TORCHELASTIC_RUN_ID")  # msrun and torchrun set these for the processes that they start


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        code: exit code.
        text: the message for the user when the code is not 0.
        time: when the rank ended, in seconds since 1970.
        traceback: of the error, if there was one. It is also in the output of the rank.
    """

    rank: int
    code: int
    text: str
    time: float
    traceback: str = ""


@dataclass(frozen=True)
class Member:
    """This process. `folder` is the folder of the job; None when no supervisor started it."""

    world: World
    folder: Path | None

    @classmethod
    def join(cls) -> Member:
        """Make sure that this process ends with its job. In a supervised job, write its output to the job's folder."""
        if JOB not in os.environ:
            if any(name in os.environ for name in _LAUNCHERS) and not is_scheduler():
                # msrun does not end its processes when a signal ends it. SIGTERM lets them save first.
                die_with_parent(signal.SIGTERM)
            return cls(World(), None)
        world, folder = World.from_environment(), Path(os.environ[JOB])
        _write_to(log_file(folder, world.rank))
        die_with_parent()
        _leave_if_alone()
        member = cls(world, folder)
        if member._reports:
            _publish(pid_file(folder, world.rank), str(os.getpid()))
            if _is_main_thread():
                signal.signal(signal.SIGTERM, partial(member._terminated, os.getpid()))
        return member

    @property
    def _reports(self) -> bool:
        """Whether a supervisor waits for word of this process. It does not for msrun's scheduler."""
        return self.folder is not None and self.world.rank >= 0

    def ended(self, code: int, text: str = "") -> int:
        """Tell the supervisor how this process ended, or print the text when there is none. Returns the code.

        In a supervised job, later output is dropped: MindSpore prints messages while its threads end.
        """
        if self.folder is None and text:
            print(text, file=sys.stderr, flush=True)
        self._record(code, text)
        if self.folder is not None:
            _write_to(Path(os.devnull))
        return code

    def crashed(self, error: Exception) -> None:
        """Tell the supervisor about an error that nothing will catch."""
        self._obey_no_more()
        place = f" in {place}" if (place := getattr(error, "place", None)) else ""
        text = f"rank {self.world.rank} of {self.world.size} failed{place}: {type(error).__name__}: {error}"
        self._record(1, text, "".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def _terminated(self, pid: int, number: int, frame: FrameType | None) -> None:
        """Tell the supervisor that SIGTERM ended this process.

        A launcher sends it when another rank has failed. Without a record this rank might be taken for the cause. A
        process that this one has forked inherits the handler, and has nothing to tell.
        """
        if os.getpid() == pid:
            self._record(TERMINATED, f"rank {self.world.rank} of {self.world.size} was ended by SIGTERM")
        os._exit(TERMINATED)

    def _obey_no_more(self) -> None:
        """Let no SIGTERM end this process between an error and its record."""
        if self._reports and _is_main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _record(self, code: int, text: str, trace: str = "") -> None:
        self._obey_no_more()
        if self.folder is not None and (self._reports or code):
            rank = max(0, self.world.rank)  # where msrun's scheduler fails, the first rank waits for nobody
            ended = Ended(rank, code, text, time.time(), trace)
            _publish(record_file(self.folder, rank), json.dumps(asdict(ended)))


def tell_stage(stage: str) -> None:
    """Tell the supervisor, if there is one, how far this rank has come: JOINING or JOINED.

    msrun's scheduler goes the same way, and is no rank.
    """
    if JOB in os.environ and not is_scheduler():
        _publish(stage_file(Path(os.environ[JOB]), World.from_environment().rank), stage)


@contextmanager
def placing(place: Callable[[], str]) -> Iterator[None]:
    """Add the place in the run to errors that are raised inside the block."""
    try:
        yield
    except Exception as error:
        error.place = place()  # type: ignore[attr-defined]
        raise


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main function and end the process, as `sys.exit(main())` does.

    With several processes, the process ends without Python's usual clean-up of the interpreter. During that clean-up
    Python ends every thread that asks for its lock. gloo's threads ask for the lock to free a tensor, perhaps long
    after the last collective. When such a thread is ended inside a C++ destructor, the process aborts with "terminate
    called without an active exception" (https://github.com/pytorch/pytorch/issues/190489).
    """
    if not is_one_of_several():
        sys.exit(main())
    code = _exit_code(main)
    threading._shutdown()  # type: ignore[attr-defined]  # wait for Python's own threads, as the interpreter does first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_code(main: Callable[[], int | None]) -> int:
    """Run `main` and return its exit code. Errors are shown as the interpreter shows them."""
    try:
        code: object = main()
    except SystemExit as ending:
        code = ending.code
    except Exception:  # noqa: BLE001 - the last place that can show the error
        sys.excepthook(*sys.exc_info())
        return 1
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _is_main_thread() -> bool:
    """Whether Python can handle signals here."""
    return threading.current_thread() is threading.main_thread()


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent process ends, for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _write_to(path: Path) -> None:
    """From now on append all output of this process to a file, even output that does not come from Python."""
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _leave_if_alone() -> None:
    """End this process if its supervisor is already gone: then `die_with_parent` came too late."""
    try:
        os.kill(int(os.environ[SUPERVISOR]), 0)
    except ProcessLookupError:
        sys.exit("the supervisor of this job is gone")


def log_file(folder: Path, rank: int) -> Path:
    return folder / (f"rank_{rank}.log" if rank >= 0 else "scheduler.log")


def pid_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.pid"


def stage_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.stage"


def record_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def read_record(folder: Path, rank: int) -> Ended | None:
    path = record_file(folder, rank)
    return Ended(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _publish(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader never sees an unfinished file."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)
