"""Starts the processes of a job with a framework's launcher, and waits until all have ended.

The launcher starts the ranks and lets them find each other. The supervisor shows the output of the first rank and
passes signals on. When a rank fails, it ends the job and prints the reason last. It leaves no process behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.launch.member import JOB, NODE, SUPERVISOR, Ended, die_with_parent, log_file, pid_file, read_record

DEFAULT_PORT = 29500
POLL_SECONDS = 0.1
# When a rank fails, others fail because of it. Wait for them, to report the one that failed first.
SECONDS_FOR_OTHERS = 1.0
# How long ranks may take to finish their step and save after a signal.
SECONDS_TO_SAVE = 600.0
# How long the launcher may take to end after all ranks have ended.
SECONDS_TO_END = 60.0
# A killed rank writes no time of its end. It is taken to have ended this long before it was noticed.
SECONDS_UNNOTICED = 0.3
CRASHED = 1
LINES_OF_LOG = 30


@dataclass(frozen=True, kw_only=True)
class Machines:
    """How many processes to start on how many machines, and which machine this is. The names are torchrun's.

    `master_port` None means a free port for one machine, and DEFAULT_PORT for several.

    >>> Machines(nproc_per_node=8, nnodes=2, node_rank=1).ranks
    range(8, 16)
    """

    nproc_per_node: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None

    @property
    def processes(self) -> int:
        return self.nproc_per_node * self.nnodes

    @property
    def ranks(self) -> range:
        """The ranks on this machine."""
        return range(self.node_rank * self.nproc_per_node, (self.node_rank + 1) * self.nproc_per_node)

    def checked(self) -> Machines:
        """The same machines, with a port.

        Raises:
            UserError: a number is out of range, or the first machine cannot open the port at its address.
        """
        if self.nproc_per_node < 1 or self.nnodes < 1 or not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                f"--nproc-per-node {self.nproc_per_node} --nnodes {self.nnodes} --node-rank {self.node_rank}: expected "
                f"positive numbers, and --node-rank from 0 to --nnodes - 1"
            )
        port = self.master_port if self.master_port is not None or self.nnodes == 1 else DEFAULT_PORT
        return replace(self, master_port=self._listen(port or 0) if self.node_rank == 0 else port)

    def _listen(self, port: int) -> int:
        """Check that the port can be opened, and return it. 0 chooses a free port."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.master_addr, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise UserError(
                        f"--master-port {port} on {self.master_addr} is in use: end the other job, or give another port"
                    ) from None
                raise UserError(
                    f"--master-addr {self.master_addr}: expected an address of this machine, since it has "
                    f"--node-rank 0 ({error})"
                ) from None
            return int(probe.getsockname()[1])


# A function of the machines, a folder for the launcher's files, and the words after `python`. It returns the command
# that starts the job, and its environment variables.
Launcher = Callable[[Machines, Path, Sequence[str]], tuple[list[str], dict[str, str]]]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        code: the exit code of the first rank that failed. 128 + the signal's number when a signal ended the job.
            CRASHED when the launcher failed. Otherwise 0.
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
) -> JobEnd:
    """Run `python WORDS` as every rank of this machine, and wait.

    Args:
        log_dir: folder that keeps the output of each rank.
        show: called with each new piece of the first rank's output.

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
    end = _Job(machines, folder, command, environment, show).run()
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
    signals: list[int] = field(default_factory=list)  # received signals, in order
    shown_bytes: int = 0  # how much of the first rank's output was shown
    deadline: float = float("inf")
    noticed: dict[int, float] = field(default_factory=dict)  # rank -> when it was seen to be gone without a record

    def run(self) -> JobEnd:
        with self._taking_signals(), (self.folder / "launcher.log").open("wb") as log:
            self.launcher = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
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

    def _wait(self) -> None:
        """Return when the job is over: all ended, one failed, or time is up."""
        passed_on = 0
        while self.launcher.poll() is None and time.monotonic() < self.deadline:
            self._show_output()
            if len(self.signals) > 1:  # a second signal means: do not wait
                return
            if len(self.signals) > passed_on:
                passed_on += 1
                self._set_deadline(SECONDS_TO_SAVE)
                self._pass_on(self.signals[0])
            if self._failures():
                self._set_deadline(SECONDS_TO_END if self.signals else SECONDS_FOR_OTHERS)
            elif self._have_ended():
                # msrun's scheduler takes seconds to notice. Ranks on other machines may still need it.
                self._set_deadline(SECONDS_FOR_OTHERS if self.machines.nnodes == 1 else SECONDS_TO_END)
            time.sleep(POLL_SECONDS)

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
        # A rank that refused its input comes first: no other rank caused that, and the launcher then kills the others.
        return sorted(failures, key=lambda end: (end.code == CRASHED, end.time))

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
        if failures and failures[0].text:
            return self._quote(failures[0])
        if self.signals:
            return JobEnd(128 + self.signals[0])
        if failures and failures[0].code != CRASHED:
            return JobEnd(failures[0].code)
        if failures:
            rank = failures[0].rank
            reason = f"rank {rank} of {self.machines.processes} was killed, or crashed"
            return self._crashed(reason, log_file(self.folder, rank))
        if launcher_code != 0 and not all(self._records()):
            return self._crashed(f"the launcher ended with code {launcher_code}", self.folder / "launcher.log")
        return JobEnd(0)

    def _quote(self, ended: Ended) -> JobEnd:
        lines = [ended.text]
        if ended.code == CRASHED:
            trace = ended.traceback.rstrip() if ended.rank != 0 else ""  # the output of rank 0 was already shown
            lines = [f"output of every rank: {self.folder}", *([trace] if trace else []), ended.text]
        return JobEnd(ended.code, "\n".join(lines))

    def _crashed(self, reason: str, log: Path) -> JobEnd:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_LOG:] if log.exists() else []
        return JobEnd(CRASHED, "\n".join([f"last lines of {log}:", *lines, reason]))

    def _pass_on(self, number: int) -> None:
        """Send a signal to the ranks. Not to the launcher, which would kill them."""
        for rank in self.machines.ranks:
            pid = self._pid(rank)
            if pid is not None and read_record(self.folder, rank) is None and _is_running(pid):
                os.kill(pid, number)

    @contextmanager
    def _taking_signals(self) -> Iterator[None]:
        def remember(number: int, frame: Any) -> None:
            self.signals.append(number)

        handlers = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

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
