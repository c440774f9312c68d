"""Reading a run's folder for the report."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.checkpoints.folders import iteration_folder
from tandem.errors import UserError
from tandem.files.places import resolved
from tandem.training.logs.events import read_events
from tandem.training.logs.expert_loads import EXPERT_LOADS, Loads, read_expert_loads
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.logs.profiling import read_profiles
from tandem.training.run_record import read_starts

WARM_UP = 3  # so many steps at the start do not count for the speed, when there are more


@dataclass(frozen=True)
class Run:
    """A run. Its `name` is unique on a page; its `steps` are the lines of metrics.jsonl."""

    name: str
    folder: Path
    starts: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    profiles: list[dict[str, Any]]
    expert_loads: list[Loads]

    @property
    def last_start(self) -> dict[str, Any]:
        return self.starts[-1]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        settings: dict[str, dict[str, Any]] = self.last_start["settings"]
        return settings

    def points(self, key: str) -> list[tuple[float, float]]:
        """(iteration, value) of each step that has the value."""
        return [(step["iteration"], step[key]) for step in self.steps if step.get(key) is not None]

    def validation_sets(self) -> list[str]:
        return sorted({name for step in self.steps for name in step["validation"]})

    def validation_points(self, name: str) -> list[tuple[float, float]]:
        return [(s["iteration"], s["validation"][name]) for s in self.steps if s["validation"].get(name) is not None]

    def task_points(self) -> dict[str, list[tuple[float, float]]]:
        """The values of each benchmark's metrics, by TASK METRIC. Runs of older versions have none."""
        found: dict[str, list[tuple[float, float]]] = {}
        for step in self.steps:
            for name, metrics in step.get("tasks", {}).items():
                for metric, value in metrics.items():
                    if value is not None:
                        found.setdefault(f"{name} {metric}", []).append((step["iteration"], value))
        return dict(sorted(found.items()))

    def typical(self, key: str) -> float | None:
        """The median over the steps, without the first few; None if no step has the value."""
        values = [value for _, value in self.points(key)]
        return statistics.median(values[WARM_UP:] or values) if values else None

    def state(self) -> str:
        """The state of the run, by its last event of starting or ending."""
        changes = [event for event in self.events if event["event"] in ("started", "finished", "stopped")]
        if not changes:
            return "unknown"
        return {"started": "running, or killed"}.get(changes[-1]["event"], changes[-1]["event"])

    def saves(self) -> list[dict[str, Any]]:
        """The events of saving, and for each whether its checkpoint still exists (`present`)."""
        return [
            {**event, "present": iteration_folder(self.folder, event["iteration"]).is_dir()}
            for event in self.events
            if event["event"] == "saved"
        ]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these `--save` folders, under the shortest names that are different.

    Raises:
        UserError: a folder has no run, or is given twice.
    """
    if not folders:
        raise UserError("no run is given; give one or more --save folders: tandem report RUN_DIR ...")
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(map(resolved, paths))) != len(paths):
        raise UserError(f"a folder is given twice: {' '.join(folders)}; give each run once")
    return [
        Run(
            name,
            path,
            read_starts(path),
            read_metrics(path / METRICS_FILE),
            read_events(path),
            read_profiles(path),
            read_expert_loads(path / EXPERT_LOADS),
        )
        for name, path in zip(_names(paths), paths)
    ]


def _names(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as make the names different."""
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
