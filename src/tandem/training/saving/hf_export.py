"""Exports checkpoints of a run as Hugging Face folders, in another process while training continues."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tandem.checkpoints.folders import iteration_folder
from tandem.launch import run_module
from tandem.launch.member import JOB
from tandem.logs import log
from tandem.training.logs.events import EventLog

EXPORTS = "hf"  # SAVE/hf/iter_0000020


@dataclass(frozen=True)
class _Running:
    iteration: int
    process: subprocess.Popen[str]


class HFExports:
    """Runs `tandem export`, one at a time. A failed export is reported, and does not end the run.

    Args:
        every: export iterations that are a multiple of this; None exports nothing.
    """

    def __init__(self, folder: Path, every: int | None, events: EventLog) -> None:
        self._folder, self._every, self._events = folder, every, events
        self._running: _Running | None = None

    @property
    def reading(self) -> int | None:
        """The iteration that is being exported; None when nothing is."""
        if self._running is not None and self._running.process.poll() is not None:
            self.wait()
        return self._running.iteration if self._running else None

    def start(self, iteration: int) -> None:
        """Export a published iteration if it is due. Waits for the previous export first."""
        if not self._every or iteration % self._every:
            return
        self.wait()
        target = iteration_folder(self._folder / EXPORTS, iteration)
        shutil.rmtree(target, ignore_errors=True)  # exported before the run was resumed
        words = ["--load", str(self._folder), "--ckpt-step", str(iteration), "--save-dir", str(target)]
        words += ["--no-verify", "--no-certificate"]  # both would open the model a second time while it trains
        # The new process is not a rank of the job.
        environment = {name: value for name, value in os.environ.items() if name != JOB}
        process = subprocess.Popen(
            [sys.executable, *run_module.command("tandem", "export", *words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C must only reach the run, which then waits for the export
        )
        self._running = _Running(iteration, process)

    def wait(self) -> None:
        """Wait for the export that is running, if any."""
        if self._running is None:
            return
        running, self._running = self._running, None
        output, _ = running.process.communicate()
        if running.process.returncode == 0:
            self._events.add("exported", iteration=running.iteration)
            return
        reason = output.strip().splitlines()[-1] if output.strip() else f"exit code {running.process.returncode}"
        log.warning("  iteration %s was not exported: %s", running.iteration, reason)
        self._events.add("export failed", iteration=running.iteration, reason=reason)

    def stop(self) -> None:
        """Stop the export that is running, if any. It leaves no folder with the final name."""
        if self._running is not None:
            self._running.process.kill()
            self._running.process.wait()
            self._running = None
