"""Run the stages of a benchmark one after the other. One that fails does not stop the next."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.backends import launcher_of
from tandem.bench.layouts import ONE_PROCESS, Spread, default_layouts
from tandem.bench.options import BenchOptions
from tandem.bench.page import page
from tandem.bench.stages import Stage, stages
from tandem.doctor import probe
from tandem.errors import UserError
from tandem.files.publish import check_writable
from tandem.frameworks import check_framework, named_framework
from tandem.launch import run_module
from tandem.launch.machines import Machines
from tandem.launch.supervisor import CRASHED, launch
from tandem.launch.world import forget_launchers, is_launched
from tandem.report.page_file import check_page

PACKAGES = ("tandem-llm", "torch", "torch-npu", "mindspore", "triton", "transformers", "numpy")
SIGNALLED = 128  # an exit code above it names a signal


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
        UserError: an output cannot be written, or is a file of something else. Or a layout cannot run here. Nothing was
            started then.
    """
    if is_launched():
        raise UserError("tandem bench starts its own processes: start it without torchrun and msrun")
    forget_launchers()
    target = Path(options.output)
    check_writable(target.parent)
    check_page(target.with_suffix(".html"))
    options = choose_layouts(options)
    results = []
    for stage in stages(options):
        results.append(_run(options, stage))
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


def worker(file: str) -> list[str]:
    """The words behind `python` that run one process of the stage that a file names."""
    return run_module.command("tandem.bench.worker", file)


def _run(options: BenchOptions, stage: Stage) -> StageResult:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stage.json"
        file.write_text(json.dumps({"options": dataclasses.asdict(options), "stage": stage.name}), encoding="utf-8")
        words, start = worker(str(file)), time.monotonic()
        run = _alone if stage.spread.processes == 1 else _together
        if error := run(options, stage, words):
            return StageResult(stage.name, stage.shows, None, error, time.monotonic() - start)
        result = json.loads(file.read_text(encoding="utf-8"))
    return StageResult(stage.name, stage.shows, result.get("figures"), result.get("error", ""), result["wall_seconds"])


def _alone(options: BenchOptions, stage: Stage, words: list[str]) -> str:
    """Run a stage of one process. Returns why there is no result; nothing when there is one."""
    command = [sys.executable, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.stage_seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {options.stage_seconds} s"
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        return f"ended with code {done.returncode}: {last}"
    return ""


def _together(options: BenchOptions, stage: Stage, words: list[str]) -> str:
    """Run a stage of several processes, with the framework's launcher. Returns as `_alone`.

    Raises:
        KeyboardInterrupt: a signal ended it.
    """
    minutes = options.stage_seconds / 60
    machines = Machines(nproc_per_node=stage.spread.processes, timeout_minutes=minutes)
    launcher = launcher_of(options.ai_framework)
    end = launch(machines, launcher, words, show=lambda text: None, seconds=options.stage_seconds)
    if end.code > SIGNALLED:
        raise KeyboardInterrupt
    if end.code == CRASHED:  # the reason stands last
        *output, reason = end.text.splitlines()
        return "\n".join([reason, *output])
    return (end.text or f"ended with code {end.code}") if end.code else ""


def choose_layouts(options: BenchOptions) -> BenchOptions:
    """The same options, with the layouts that this machine can run.

    Raises:
        UserError: a layout has more processes than there are devices, or the framework does not start.
    """
    check_framework(options.ai_framework)
    wanted = [Spread.named(name) for name in options.layouts]
    if wanted and (options.device == "cpu" or max(spread.processes for spread in wanted) == 1):
        return options
    if options.device == "cpu":
        return dataclasses.replace(options, layouts=(ONE_PROCESS,))
    try:
        found = probe(named_framework(options.ai_framework).name)
    except RuntimeError as error:
        raise UserError(f"--ai-framework {options.ai_framework} does not start: {error}") from None
    on_cpu = found["devices"].endswith("cpu")
    for spread in wanted:
        if not on_cpu and spread.processes > found["count"]:
            raise UserError(
                f"--layouts {spread.name}: has {spread.processes} processes, and this machine {found['devices']}: name "
                f"a layout of at most {found['count']}, or --device cpu"
            )
    layouts = options.layouts or default_layouts(found["count"], options.configs, options.ai_framework)
    return dataclasses.replace(options, layouts=layouts)
