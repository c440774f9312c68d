"""Starts the processes of a job with a framework's launcher, and waits until all have ended.

The launcher starts the ranks and lets them find each other. The supervisor shows the output of the first rank and
passes signals on. When a rank fails, it ends the job and prints the reason last. It leaves no process behind.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.launch import out_of_memory
from tandem.launch.machines import Machines
from tandem.launch.member import (
    JOB,
    JOINED,
    JOINING,
    NODE,
    SUPERVISOR,
    TERMINATED,
    Ended,
    die_with_parent,
    log_file,
    pid_file,
    read_record,
    stage_file,
)
from tandem.launch.stopping import SAME_SIGNAL_SECONDS, Handler, handled, stopping_signals
from tandem.launch.streams import OUTPUT, lent
from tandem.logs import log

POLL_SECONDS = 0.1
# How long machines wait for each other before that is said.
SECONDS_UNSAID = 10.0
# When a rank fails, others fail because of it. Wait for them, to report the one that failed first.
SECONDS_FOR_OTHERS = 1.0
# How long ranks may take to finish their step and save after a signal.
SECONDS_TO_SAVE = 600.0
# How long the launcher may take to end after all ranks have ended.
SECONDS_TO_END = 60.0
# A killed rank writes no time of its end. It is taken to have ended this long before it was noticed.
SECONDS_UNNOTICED = 0.3
CRASHED = 1
USER_ERROR = 2
TIMED_OUT = 124  # as the program `timeout` says it
LINES_OF_LOG = 30


# A function of the machines, a folder for the launcher's files, and the words after `python`. It returns the command
# that starts the job, and its environment variables.
Launcher = Callable[[Machines, Path, Sequence[str]], tuple[list[str], dict[str, str]]]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        code: the exit code of the first rank that failed. 128 + the signal's number when a signal ended the job.
            USER_ERROR when other machines did not come. TIMED_OUT when the job took too long. CRASHED when the
            launcher failed. Otherwise 0.
        text: why the job failed; empty when it did not fail.
    """

    code: int
    text: str = ""


def show_at_once(text: str) -> None:
    """Write to standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()


def launch(
    machines: Machines,
    launcher: Launcher,
    words: Sequence[str],
    log_dir: str | None = None,
    show: Callable[[str], None] = show_at_once,
    seconds: float = math.inf,
    streams: Sequence[int] = (),
) -> JobEnd:
    """Run `python WORDS` as every rank of this machine, and wait.

    Args:
        log_dir: folder that keeps the output of each rank.
        show: called with each new piece of the first rank's output.
        seconds: a job that takes longer is ended, with no time to save.
        streams: standard streams of this process that the job's first rank takes with `take_streams`. With OUTPUT it
            talks with the user, and gets each Ctrl-C as soon as the ranks have met: that no longer ends the job.

    Raises:
        UserError: as in `Machines.checked`, or `log_dir` cannot be written. Nothing was started then.
    """
    machines = machines.checked()
    folder = Path(tempfile.mkdtemp(prefix="tandem-job-"))
    if log_dir is not None:
        _keep_output(folder, Path(log_dir), machines.ranks)
    command, environment = launcher(machines, folder, words)
    environment = {
        **os.environ,
        **environment,
        JOB: str(folder),
        SUPERVISOR: str(os.getpid()),
        NODE: str(machines.node_rank),
        "PYTHONUNBUFFERED": "1",
    }
    streams = streams if machines.node_rank == 0 else ()
    end = _Job(machines, folder, command, environment, show, seconds, streams).run()
    if end.code != CRASHED:
        shutil.rmtree(folder)
    return end


@dataclass
class _Job:
    machines: Machines
    folder: Path
    command: list[str]
    environment: dict[str, str]
    show: Callable[[str], None]
    seconds: float = math.inf  # the most that the job may take
    streams: Sequence[int] = ()  # standard streams for the first rank
    signals: list[int] = field(default_factory=list)  # received signals, in order
    signal_times: dict[int, float] = field(default_factory=dict)  # signal -> when it last came
    is_impatient: bool = False  # whether a signal came twice
    shown_bytes: int = 0  # how much of the first rank's output was shown
    deadline: float = float("inf")
    noticed: dict[int, float] = field(default_factory=dict)  # rank -> when it was seen to be gone without a record
    waiting_since: float | None = None  # since when this machine has waited for others
    has_said_so: bool = False
    is_late: bool = False  # whether the others did not come in time
    took_too_long: bool = False

    def run(self) -> JobEnd:
        self.kills_before = out_of_memory.kills()
        self.last_moment = time.monotonic() + self.seconds
        # A first rank that talks with the user is in no session of the terminal, which cannot stop it at Ctrl-Z.
        terminal: dict[int, Handler | signal.Handlers] = {}
        if self.talks:
            terminal = {signal.SIGWINCH: self._tell_first, signal.SIGTSTP: signal.SIG_IGN}
        with (
            handled(terminal),
            stopping_signals(self._remember),
            lent(self.folder, self.streams) as self.give_streams,
            (self.folder / "launcher.log").open("wb") as output,
        ):
            self.launcher = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            try:
                self._wait()
            finally:
                code, failures = self.launcher.poll(), self._failures()
                self._kill_everything()
            self._show_output()
        return self._explain(failures, code)

    @property
    def talks(self) -> bool:
        """Whether the first rank talks with the user."""
        return OUTPUT in self.streams

    def _tell_first(self, number: int, frame: Any) -> None:
        """A handler of signals that are for the first rank alone."""
        self._pass_on(number, self.machines.ranks[:1])

    def _remember(self, number: int, frame: Any) -> None:
        """The handler of signals. The same one again, but not at once, means: do not wait."""
        if number == signal.SIGINT and self.talks and self._has_begun():
            self._tell_first(number, frame)
            return
        now = time.monotonic()
        self.is_impatient |= now - self.signal_times.get(number, now) > SAME_SIGNAL_SECONDS
        self.signal_times[number] = now
        self.signals.append(number)

    def _wait(self) -> None:
        """Return when the job is over: all ended, one failed, or time is up."""
        has_passed_on = False
        while self.launcher.poll() is None and time.monotonic() < self.deadline:
            self._show_output()
            self.give_streams()
            if self.signals and (self.is_impatient or not self._has_begun()):
                return
            if self.signals and not has_passed_on:
                has_passed_on = True
                self._set_deadline(SECONDS_TO_SAVE)
                self._pass_on(self.signals[0], self.machines.ranks)
            if self._waits_in_vain():
                return
            if time.monotonic() > self.last_moment and not self._have_ended():
                self.took_too_long = True
                return
            if self._failures():
                self._set_deadline(SECONDS_TO_END if self.signals else SECONDS_FOR_OTHERS)
            elif self._have_ended():
                # msrun's scheduler takes seconds to notice. Ranks on other machines may still need it.
                self._set_deadline(SECONDS_FOR_OTHERS if self.machines.nnodes == 1 else SECONDS_TO_END)
            time.sleep(POLL_SECONDS)

    def _has_begun(self) -> bool:
        """Whether the ranks of this machine have met all others. Before that, no rank has anything to save."""
        return all(stage == JOINED for stage in self._stages())

    def _stages(self) -> list[str | None]:
        """How far each rank of this machine has come; None before it waits for others."""
        paths = [stage_file(self.folder, rank) for rank in self.machines.ranks]
        return [path.read_text(encoding="utf-8") if path.exists() else None for path in paths]

    def _waits_in_vain(self) -> bool:
        """Whether other machines did not come in time. That this one waits for them is said once."""
        stages = self._stages()
        has_no_rank = all(self._pid(rank) is None for rank in self.machines.ranks)  # torchrun starts none before
        if self.machines.nnodes == 1 or not (has_no_rank or set(stages) == {JOINING}):
            self.waiting_since = None
            return False
        now = time.monotonic()
        self.waiting_since = self.waiting_since or now
        minutes = self.machines.timeout_minutes
        if now - self.waiting_since > SECONDS_UNSAID and not self.has_said_so:
            self.has_said_so = True
            log.warning(
                "machine %d of --nnodes %d waits for the others at %s, for at most %g minutes "
                "(--distributed-timeout-minutes)",
                *(self.machines.node_rank, self.machines.nnodes, self.machines.meeting_place, minutes),
            )
        self.is_late = now - self.waiting_since > 60 * minutes
        return self.is_late

    def _set_deadline(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _records(self) -> list[Ended | None]:
        return [read_record(self.folder, rank) for rank in self.machines.ranks]

    def _have_ended(self) -> bool:
        """Whether all ranks of this machine have ended by themselves."""
        pids = [self._pid(rank) for rank in self.machines.ranks]
        return all(self._records()) and not any(pid is not None and _is_running(pid) for pid in pids)

    def _failures(self) -> list[Ended]:
        """Ranks that ended with a code other than 0, the cause first. Killed ranks have no text."""
        endings = [self._ended(rank) for rank in self.machines.ranks]
        failures = [end for end in endings if end and end.code]
        # A rank that refused its input comes first: no other rank caused that, and the launcher then ends the others.
        return sorted(failures, key=lambda end: (end.code == TERMINATED, end.code == CRASHED, end.time))

    def _ended(self, rank: int) -> Ended | None:
        """How a rank ended; None when it has not ended, or not started."""
        pid = self._pid(rank)
        is_gone = pid is not None and not _is_running(pid)
        record = read_record(self.folder, rank)
        if record is not None or not is_gone:
            return record
        return Ended(rank, CRASHED, "", self.noticed.setdefault(rank, time.time() - SECONDS_UNNOTICED))

    def _pid(self, rank: int) -> int | None:
        path = pid_file(self.folder, rank)
        return int(path.read_text(encoding="utf-8")) if path.exists() else None

    def _show_output(self) -> None:
        """Print what the first rank has written since the last call."""
        path = log_file(self.folder, self.machines.ranks[0])
        if self.machines.node_rank == 0 and path.exists():
            with path.open("rb") as log:
                log.seek(self.shown_bytes)
                new = log.read()
            self.shown_bytes += len(new)
            if new:
                self.show(new.decode(errors="replace"))

    def _explain(self, failures: list[Ended], launcher_code: int | None) -> JobEnd:
        """How the job ended, and why it failed."""
        obeyed = self.signals and failures and failures[0].code == TERMINATED  # this job's ranks got the signal, too
        if failures and failures[0].text and not obeyed:
            return self._quote(failures[0])
        if self.signals:
            return JobEnd(128 + self.signals[0], self._unbegun())
        if self.is_late:
            return JobEnd(USER_ERROR, self._missing_machines())
        if self.took_too_long and not failures:
            return JobEnd(TIMED_OUT, f"stopped after {self.seconds:g} s")
        if failures and failures[0].code != CRASHED:
            return JobEnd(failures[0].code)
        if failures:
            rank = failures[0].rank
            reason = f"rank {rank} of {self.machines.processes} {self._cause()}"
            return self._crashed(reason, log_file(self.folder, rank))
        if launcher_code != 0 and not all(self._records()):
            return self._crashed(f"the launcher ended with code {launcher_code}", self.folder / "launcher.log")
        return JobEnd(0)

    def _unbegun(self) -> str:
        """What to say of a job that a signal ended."""
        if self._has_begun():
            return ""
        return f"ended by {signal.Signals(self.signals[0]).name} while its processes started: nothing was trained"

    def _missing_machines(self) -> str:
        machines = self.machines
        return (
            f"--nnodes {machines.nnodes}: not every machine came to {machines.meeting_place} within "
            f"--distributed-timeout-minutes {machines.timeout_minutes:g}. Start the same command on each machine, with "
            f"--node-rank 0 to {machines.nnodes - 1}; --master-addr must be the address of machine 0, which the others "
            f"can reach"
        )

    def _cause(self) -> str:
        """Why a rank is gone that said nothing."""
        kills = out_of_memory.kills()
        if kills is None or self.kills_before is None or kills <= self.kills_before:
            return "was killed, or crashed"
        return (
            "was killed by the system, because memory ran out: give a smaller --micro-batch-size or --seq-length, or "
            "recompute or shard more (`tandem plan` says what a run needs)"
        )

    def _quote(self, ended: Ended) -> JobEnd:
        lines = [ended.text]
        if ended.code == CRASHED:
            trace = ended.traceback.rstrip() if ended.rank != 0 else ""  # the output of rank 0 was already shown
            lines = [f"output of every rank: {self.folder}", *([trace] if trace else []), ended.text]
        return JobEnd(ended.code, "\n".join(lines))

    def _crashed(self, reason: str, log: Path) -> JobEnd:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_LOG:] if log.exists() else []
        return JobEnd(CRASHED, "\n".join([f"last lines of {log}:", *lines, reason]))

    def _pass_on(self, number: int, ranks: Iterable[int]) -> None:
        """Send a signal to ranks. Not to the launcher, which would kill them."""
        for rank in ranks:
            pid = self._pid(rank)
            if pid is not None and read_record(self.folder, rank) is None and _is_running(pid):
                os.kill(pid, number)

    def _kill_everything(self) -> None:
        """Kill the launcher, then all processes of the job, until none is left."""
        if self.launcher.poll() is None:
            self.launcher.kill()
        self.launcher.wait()
        while pids := self._members():
            for pid in pids:
                _kill(pid)
            time.sleep(POLL_SECONDS)

    def _members(self) -> list[int]:
        """All processes of the job, which have its folder in their environment. Without /proc: the ranks."""
        if not Path("/proc/self/environ").exists():
            pids = [self._pid(rank) for rank in self.machines.ranks]
            return [pid for pid in pids if pid is not None and _is_running(pid)]
        mark = f"{JOB}={self.folder}".encode()
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if mark in _environment(path)]


def _keep_output(folder: Path, logs: Path, ranks: Iterable[int]) -> None:
    """Link the output files of the job to new, empty files in `logs`."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for rank in ranks:
            target = logs.resolve() / log_file(folder, rank).name
            target.write_bytes(b"")
            log_file(folder, rank).symlink_to(target)
    except OSError as error:
        shutil.rmtree(folder)
        raise UserError(f"--log-dir {logs}: {error.strerror}") from None


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # the process has ended, or belongs to another user
        return []


def _is_running(pid: int) -> bool:
    """Whether a process runs. A process that has ended but whose parent has not noticed does not run."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
