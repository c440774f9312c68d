"""Run the stages of a benchmark one after the other. One that fails does not stop the next."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.bench.options import BenchOptions
from tandem.bench.page import page
from tandem.bench.stages import stages
from tandem.files.publish import check_writable
from tandem.report.page_file import check_page

PACKAGES = ("tandem-llm", "torch", "torch-npu", "mindspore", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class StageResult:
    """What a stage gave.

    Attributes:
        figures: None where it failed.
        error: why it failed; empty where it did not.
    """

    name: str
    shows: str
    figures: dict[str, Any] | None
    error: str
    wall_seconds: float


def bench(options: BenchOptions, on_stage: Callable[[StageResult], None] = lambda result: None) -> list[StageResult]:
    """Measure, and write the results and a page about them. After each stage both files hold what is known.

    Args:
        on_stage: called with each result.

    Raises:
        UserError: an output cannot be written, or is a file of something else.
    """
    target = Path(options.output)
    check_writable(target.parent)
    check_page(target.with_suffix(".html"))
    results = []
    for stage in stages(options):
        results.append(_run(options, stage.name, stage.shows))
        record = {
            "versions": versions(),
            "options": dataclasses.asdict(options),
            "stages": [dataclasses.asdict(result) for result in results],
        }
        target.write_text(json.dumps(record, indent=1), encoding="utf-8")
        target.with_suffix(".html").write_text(page(record), encoding="utf-8")
        on_stage(results[-1])
    return results


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _run(options: BenchOptions, name: str, shows: str) -> StageResult:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stage.json"
        file.write_text(json.dumps({"options": dataclasses.asdict(options), "stage": name}), encoding="utf-8")
        command = [sys.executable, "-m", "tandem.bench.worker", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.stage_seconds, check=False)
        except subprocess.TimeoutExpired:
            return StageResult(name, shows, None, f"stopped after {options.stage_seconds} s", options.stage_seconds)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-5:])
            return StageResult(name, shows, None, f"ended with code {done.returncode}: {last}", 0.0)
        result = json.loads(file.read_text(encoding="utf-8"))
    return StageResult(name, shows, result.get("figures"), result.get("error", ""), result["wall_seconds"])
