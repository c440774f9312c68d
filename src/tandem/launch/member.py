"""A process in a job that `tandem.launch.supervisor` supervises: where its output goes, and what it ended with.

The supervisor names a folder in TANDEM_JOB; each process leaves there its output, its pid and, when it ends by itself,
a record. Without that variable a process only sees to it that it ends with its launcher.
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
from pathlib import Path
from typing import NoReturn

from tandem.launch.world import World, is_one_of_several, is_scheduler

JOB = "TANDEM_JOB"
SUPERVISOR = "TANDEM_SUPERVISOR"  # its process
NODE = "TANDEM_NODE"  # number of this machine in the job
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = ("MS_ROLE", "TORCHELASTIC_RUN_ID")  # variables of msrun and of torchrun in what they start


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, and what the user should read when that is not 0. The traceback, if any, is in
    the rank's output, too."""

    rank: int
    code: int
    text: str
    time: float
    traceback: str = ""


@dataclass(frozen=True)
class Member:
    """This process; `folder` is None outside a supervised job."""

    world: World
    folder: Path | None

    @classmethod
    def join(cls) -> Member:
        """Make sure that this process ends with its job; of a supervised one, send its output to the job's folder."""
        if JOB not in os.environ:
            if any(name in os.environ for name in _LAUNCHERS) and not is_scheduler():
                die_with_parent(signal.SIGTERM)  # msrun leaves its processes behind at any signal; they save first
            return cls(World(), None)
        world, folder = World.from_environment(), Path(os.environ[JOB])
        _write_to(log_file(folder, world.rank))
        die_with_parent()
        _leave_if_alone()
        if not is_scheduler():
            _publish(pid_file(folder, world.rank), str(os.getpid()))
        return cls(world, folder)

    def ended(self, code: int, text: str = "") -> int:
        """Tell the supervisor, or without one print the text; returns the code.

        Of a job's process nothing is shown from here on: MindSpore speaks of its threads as they end.
        """
        if self.folder is None and text:
            print(text, file=sys.stderr, flush=True)
        self._record(code, text)
        if self.folder is not None:
            _write_to(Path(os.devnull))
        return code

    def crashed(self, error: Exception) -> None:
        """Tell the supervisor of an error that nothing will catch."""
        place = f" in {place}" if (place := getattr(error, "place", None)) else ""
        text = f"rank {self.world.rank} of {self.world.size} failed{place}: {type(error).__name__}: {error}"
        self._record(1, text, "".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def _record(self, code: int, text: str, trace: str = "") -> None:
        if self.folder is not None and not is_scheduler():
            ended = Ended(self.world.rank, code, text, time.time(), trace)
            _publish(record_file(self.folder, self.world.rank), json.dumps(asdict(ended)))


@contextmanager
def placing(place: Callable[[], str]) -> Iterator[None]:
    """Errors of the block say where in the run they happened."""
    try:
        yield
    except Exception as error:
        error.place = place()  # type: ignore[attr-defined]
        raise


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main function and end the process, as `sys.exit(main())` does.

    One of several processes ends without taking its Python interpreter apart. That would end every thread that asks
    for Python's lock from then on. gloo's threads ask for it to let go of a tensor: possibly long after a collective is
    over, and after its group was destroyed. Within a C++ destructor such an end is an abort: "terminate called without
    an active exception" (https://github.com/pytorch/pytorch/issues/190489).
    """
    if not is_one_of_several():
        sys.exit(main())
    code = _exit_code(main)
    threading._shutdown()  # type: ignore[attr-defined]  # as an interpreter does first: wait for Python's own threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_code(main: Callable[[], int | None]) -> int:
    """Run it; whatever it raises is shown as the interpreter shows it."""
    try:
        code: object = main()
    except SystemExit as ending:
        code = ending.code
    except Exception:  # noqa: BLE001 - the last place that can show it
        sys.excepthook(*sys.exc_info())
        return 1
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _write_to(path: Path) -> None:
    """Add this process's output to a file from here on, also what no Python writes."""
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _leave_if_alone() -> None:
    """When the job was killed while this process was starting, no parent is left to die."""
    try:
        os.kill(int(os.environ[SUPERVISOR]), 0)
    except ProcessLookupError:
        sys.exit("the supervisor of this job is gone")


def log_file(folder: Path, rank: int) -> Path:
    return folder / (f"rank_{rank}.log" if rank >= 0 else "scheduler.log")


def pid_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.pid"


def record_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def read_record(folder: Path, rank: int) -> Ended | None:
    path = record_file(folder, rank)
    return Ended(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _publish(path: Path, text: str) -> None:
    """Under its name the file is whole."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)
