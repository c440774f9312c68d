"""Starting the processes of a job with a framework's own launcher, and staying with them until all are gone.

The launcher starts the ranks and lets them find each other. The supervisor shows the first rank's output, ends the job
when one rank fails, and says why last; it passes signals on, and leaves no process behind.
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
# A rank that fails takes others with it; whoever failed first is told, so wait for all that fail at once.
SECONDS_FOR_OTHERS = 1.0
# For ranks that were asked to stop, to finish their step and save; and for the launcher, when all ranks have ended.
SECONDS_TO_SAVE = 600.0
SECONDS_TO_END = 60.0
# A rank that is killed leaves no time of its death, and others may fail for it before it is noticed.
SECONDS_UNNOTICED = 0.3
CRASHED = 1
LINES_OF_LOG = 30


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The processes to start: so many on each of so many machines, of which this is one. Names are torchrun's.

    `master_port` None is a free one on a single machine, DEFAULT_PORT on several.
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
        """Those of this machine."""
        return range(self.node_rank * self.nproc_per_node, (self.node_rank + 1) * self.nproc_per_node)

    def checked(self) -> Machines:
        """With the port chosen.

        Raises:
            UserError: a number is out of range, or the first machine cannot listen at the address.
        """
        if self.nproc_per_node < 1 or self.nnodes < 1 or not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                f"--nproc-per-node {self.nproc_per_node} --nnodes {self.nnodes} --node-rank {self.node_rank}: expected "
                f"positive numbers, and a node rank from 0 to --nnodes - 1"
            )
        port = self.master_port if self.master_port is not None or self.nnodes == 1 else DEFAULT_PORT
        return replace(self, master_port=self._listen(port or 0) if self.node_rank == 0 else port)

    def _listen(self, port: int) -> int:
        """Try the port, 0 for any; returns it."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.master_addr, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise UserError(
                        f"--master-port {port} on {self.master_addr} is in use: end that job, or give another port"
                    ) from None
                raise UserError(
                    f"--master-addr {self.master_addr}: no address of this machine, which has --node-rank 0 ({error})"
                ) from None
            return int(probe.getsockname()[1])


# From machines, a folder for the launcher's own files, and the words after `python`: command and environment.
Launcher = Callable[[Machines, Path, Sequence[str]], tuple[list[str], dict[str, str]]]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        code: the first rank's exit code that is not 0, 128 + the signal's number when a signal ended the job, CRASHED
            when the launcher failed, else 0.
        text: why it failed; empty when it did not.
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
        log_dir: where each rank's output stays.
        show: takes what the first rank writes, as it comes.

    Raises:
        UserError: as `Machines.checked`, or there is no writing to `log_dir`; nothing was started.
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
    signals: list[int] = field(default_factory=list)  # received, in order
    shown: int = 0  # bytes of the first rank's output that are on the console
    deadline: float = float("inf")
    noticed: dict[int, float] = field(default_factory=dict)  # rank -> when it was found dead, without a record

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
            if len(self.signals) > 1:  # whoever asks twice does not want to wait
                return
            if len(self.signals) > passed_on:
                passed_on += 1
                self._set_deadline(SECONDS_TO_SAVE)
                self._pass_on(self.signals[0])
            if self._failures():
                self._set_deadline(SECONDS_TO_END if self.signals else SECONDS_FOR_OTHERS)
            elif self._have_ended():
                # msrun's scheduler takes seconds to notice; other machines' ranks may still need it.
                self._set_deadline(SECONDS_FOR_OTHERS if self.machines.nnodes == 1 else SECONDS_TO_END)
            time.sleep(POLL_SECONDS)

    def _set_deadline(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _records(self) -> list[Ended | None]:
        return [read_record(self.folder, rank) for rank in self.machines.ranks]

    def _have_ended(self) -> bool:
        """All ranks of this machine have left by themselves."""
        pids = [self._pid(rank) for rank in self.machines.ranks]
        return all(self._records()) and not any(pid is not None and _is_running(pid) for pid in pids)

    def _failures(self) -> list[Ended]:
        """Ranks that ended with another code than 0, the cause first; those that were killed have no text."""
        ends = [self._ended(rank) for rank in self.machines.ranks]
        failures = [end for end in ends if end and end.code]
        # A rank that refused its input was not brought down by another one; the launcher kills the others for it.
        return sorted(failures, key=lambda end: (end.code == CRASHED, end.time))

    def _ended(self, rank: int) -> Ended | None:
        """How a rank ended; None when it has not, or not begun."""
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
        """Copy what the first rank of this machine has written since."""
        path = log_file(self.folder, self.machines.ranks[0])
        if self.machines.node_rank == 0 and path.exists():
            with path.open("rb") as log:
                log.seek(self.shown)
                new = log.read()
            self.shown += len(new)
            if new:
                self.show(new.decode(errors="replace"))

    def _explain(self, failures: list[Ended], launcher_code: int | None) -> JobEnd:
        """What went wrong."""
        if failures and failures[0].text:
            return self._quote(failures[0])
        if self.signals:
            return JobEnd(128 + self.signals[0])
        if failures and failures[0].code != CRASHED:
            return JobEnd(failures[0].code)
        if failures:
            rank = failures[0].rank
            what = f"rank {rank} of {self.machines.processes} was killed, or crashed"
            return self._crashed(what, log_file(self.folder, rank))
        if launcher_code != 0 and not all(self._records()):
            return self._crashed(f"the launcher ended with code {launcher_code}", self.folder / "launcher.log")
        return JobEnd(0)

    def _quote(self, ended: Ended) -> JobEnd:
        lines = [ended.text]
        if ended.code == CRASHED:
            trace = ended.traceback.rstrip() if ended.rank != 0 else ""  # rank 0's output is shown already
            lines = [f"output of every rank: {self.folder}", *([trace] if trace else []), ended.text]
        return JobEnd(ended.code, "\n".join(lines))

    def _crashed(self, what: str, log: Path) -> JobEnd:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_LOG:] if log.exists() else []
        return JobEnd(CRASHED, "\n".join([f"last lines of {log}:", *lines, what]))

    def _pass_on(self, number: int) -> None:
        """To the ranks only: a launcher would kill them."""
        for rank in self.machines.ranks:
            pid = self._pid(rank)
            if pid is not None and read_record(self.folder, rank) is None and _is_running(pid):
                os.kill(pid, number)

    @contextmanager
    def _taking_signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self.signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _kill_everything(self) -> None:
        """Kill the launcher, then whatever belongs to the job, until nothing does."""
        if self.launcher.poll() is None:
            self.launcher.kill()
        self.launcher.wait()
        while pids := self._members():
            for pid in pids:
                _kill(pid)
            time.sleep(POLL_SECONDS)

    def _members(self) -> list[int]:
        """Every process that has inherited the job's mark; without /proc, the ranks."""
        if not Path("/proc/self/environ").exists():
            pids = [self._pid(rank) for rank in self.machines.ranks]
            return [pid for pid in pids if pid is not None and _is_running(pid)]
        mark = f"{JOB}={self.folder}".encode()
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if mark in _environment(path)]


def _keep_output(folder: Path, logs: Path, ranks: Iterable[int]) -> None:
    """Let the job's output be written to files outside its folder, which are empty now."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for rank in ranks:
            kept = logs.resolve() / log_file(folder, rank).name
            kept.write_bytes(b"")
            log_file(folder, rank).symlink_to(kept)
    except OSError as error:
        shutil.rmtree(folder)
        raise UserError(f"--log-dir {logs}: {error.strerror}") from None


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


def _is_running(pid: int) -> bool:
    """Also false when it has ended and its parent has not noticed."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
