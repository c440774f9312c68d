"""`--profile`: runs the framework's profiler over a few steps, and shows the time of each module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.backends import start_profiler
from tandem.backends.interface import Profiler
from tandem.config.settings import LoggingSettings
from tandem.files.publish import write_text_atomically
from tandem.logs import log
from tandem.training.logs.log import StepRecord

PROFILE_FOLDER = "profile"


class StepProfiler:
    """Profiles the steps after `--profile-step-start` up to `--profile-step-end`, on the first rank.

    Evaluations and saves between these steps are profiled as well.

    Args:
        save: folder of the run, for the summary; None writes no summary.
        iteration: the last finished iteration. A run that resumes within or after the profiled steps profiles nothing.
    """

    def __init__(self, logging: LoggingSettings, ai_framework: str, save: Path | None, iteration: int) -> None:
        self._framework, self._save = ai_framework, save
        self._start, self._end = logging.profile_step_start, logging.profile_step_end
        self._folder = Path(logging.profile_save_path or (save or Path()) / PROFILE_FOLDER)
        self._profiler: Profiler | None = None
        self._is_done = iteration > self._start
        if self._is_done:
            log.info("> %s: the run goes on after iteration %s, so nothing is profiled", self._window, iteration)
        self._begin_at(iteration)

    def on_step(self, record: StepRecord) -> None:
        self._begin_at(record.iteration)
        if record.iteration == self._end:
            self._finish(record.iteration)

    def close(self) -> None:
        """Stop the profiler. A run that ends early keeps the trace, but has no summary; then this is said."""
        if self._profiler is not None:
            self._profiler.stop()
            log.info(
                " %s: the run ended inside them: the trace is in %s, without a summary", self._window, self._folder
            )
        elif not self._is_done:
            log.info(" %s: the run ended before them, so nothing was profiled", self._window)

    @property
    def _window(self) -> str:
        return f"--profile of iterations {self._start + 1} to {self._end}"

    def _begin_at(self, iteration: int) -> None:
        if iteration == self._start:
            self._profiler = start_profiler(self._framework, self._folder)

    def _finish(self, iteration: int) -> None:
        if self._profiler is None:
            return
        seconds, trace = self._profiler.stop()
        self._profiler, self._is_done = None, True
        log.info(table(self._start + 1, iteration, seconds, trace))
        if self._save:
            write_profile(self._save, self._start + 1, iteration, seconds, trace)


def table(first: int, last: int, seconds: Mapping[str, float], trace: str) -> str:
    """The summary as plain lines, longest time first."""
    total = sum(seconds.values()) or 1.0
    lines = [f" profile of iterations {first} to {last} | trace: {trace}"]
    for name, duration in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"    {name:.<48} {duration:9.4f} s {duration / total:6.1%}")
    return "\n".join(lines)


def write_profile(folder: Path, first: int, last: int, seconds: Mapping[str, float], trace: str) -> None:
    """Write a summary to the folder of a run."""
    content = {"first": first, "last": last, "seconds": dict(seconds), "trace": trace}
    path = folder / PROFILE_FOLDER / f"steps_{first}_{last}.json"
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def read_profiles(folder: Path) -> list[dict[str, Any]]:
    """All summaries of a run, in order of their first step. A damaged one is left out, and named in the log."""
    profiles = []
    for file in (folder / PROFILE_FOLDER).glob("steps_*.json"):
        try:
            profile = json.loads(file.read_bytes())
            profiles.append((profile["first"], profile))
        except (KeyError, TypeError, ValueError):
            log.warning("%s: this summary is damaged, and left out", file)
    return [profile for _, profile in sorted(profiles, key=lambda entry: entry[0])]
