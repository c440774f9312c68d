"""`tandem doctor`: what is installed, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tandem.frameworks import FRAMEWORKS, TORCH, Framework
from tandem.launch import run_module
from tandem.machine import cann_version, memory_bytes

PYTHON = ((3, 10), (3, 12))  # first and last minor version
REQUIRED = ("numpy", "ml_dtypes", "tokenizers", "orjson", "pyarrow", "jinja2", "pyyaml", "rich")
# Package -> what it is for, and the extra that installs it.
OPTIONAL = {
    "gigatoken": ("fast tokenising", "fast"),
    "tensorboard": ("--tensorboard-dir", "tensorboard"),
    "wandb": ("--wandb-project", "wandb"),
    "starlette": ("tandem serve", "serve"),
    "uvicorn": ("tandem serve", "serve"),
}
PROBE_SECONDS = 120  # the first import of a framework may compile files and write caches


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        subject: what was checked, such as a package.
        state: what was found, such as its version.
        remedy: what to do about it; empty when nothing is wrong.
    """

    subject: str
    state: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `blockers` says why no run could start here; it is empty when a run can start."""

    findings: list[Finding]
    blockers: list[str]


def examine() -> Diagnosis:
    """Check Python, packages, frameworks with their devices, launchers and the machine."""
    python, packages = examine_python(), [examine_package(name) for name in REQUIRED]
    frameworks = [finding for framework in FRAMEWORKS for finding in examine_framework(framework)]
    blockers = [f"{finding.subject}: {finding.remedy}" for finding in [python, *packages] if finding.remedy]
    names = [framework.name for framework in FRAMEWORKS]
    if all(finding.remedy for finding in frameworks if finding.subject in names):
        blockers.append("no framework works: " + "; ".join(finding.remedy for finding in frameworks if finding.remedy))
    optional = [examine_optional(name) for name in OPTIONAL]
    return Diagnosis([python, *packages, *frameworks, *optional, *examine_machine()], blockers)


def examine_python() -> Finding:
    first, last = ((f"{major}.{minor}") for major, minor in PYTHON)
    is_supported = PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]
    return Finding("python", platform.python_version(), "" if is_supported else f"use Python {first} to {last}")


def examine_package(name: str) -> Finding:
    version = version_of(name)
    if version is None:
        return Finding(name, "missing", f"pip install {name}")
    if name == "numpy" and int(version.split(".")[0]) >= 2 and version_of("mindspore") is not None:
        return Finding(name, version, "pip install 'numpy<2', which MindSpore needs")
    return Finding(name, f"{version}; needs {needed}" if (needed := required(name)) else version)


def required(name: str) -> str | None:
    """The versions of another package that Tandem needs, in the form that pip reads.

    None when any version works, or when Tandem itself is not installed.
    """
    try:
        lines = importlib.metadata.requires("tandem-llm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    matching = [line for line in lines if re.match(rf"{re.escape(name)}\s*[<>=!~]", line, re.IGNORECASE)]
    return matching[0].partition(";")[0].strip() if matching else None


def examine_framework(framework: Framework) -> Iterator[Finding]:
    """The framework, its devices and its launcher. The framework is imported in another process."""
    name = framework.name
    if version_of(name) is None:
        yield Finding(name, "missing", f"pip install 'tandem-llm[{name}]'")
        return
    try:
        answer = probe(name)
    except RuntimeError as error:
        yield Finding(
            name, f"{version_of(name)}, but it does not start: {error}", f"pip install --force-reinstall {name}"
        )
        return
    notice = framework.version_notice()
    state = f"{answer['version']}; needs {framework.requirement}" + (f"; {notice}" if notice else "")
    yield Finding(name, state, framework.version_remedy() or "")
    yield Finding(
        f"{name} devices", f"{answer['devices']}; {answer['dtypes']}", missing_plugin(framework, answer["devices"])
    )
    if lacking := answer.get("lacking"):
        what, _, remedy = lacking.partition("; ")
        yield Finding(f"{name} compiler", f"{what}, so each step takes longer", remedy)
    if answer.get("cann"):
        yield examine_cann(name, answer["version"], answer["cann"])
    launcher = framework.launcher
    on_path = shutil.which(launcher) or shutil.which(launcher, path=os.path.dirname(sys.executable))
    yield Finding(launcher, on_path or "missing", "" if on_path else f"pip install --force-reinstall {name}")


def examine_cann(name: str, version: str, accepted: list[str]) -> Finding:
    """The CANN that is installed, and the releases that this version of a framework accepts."""
    found = cann_version()
    state = f"{found or 'not found'}; {name} {version} goes with {', '.join(accepted)}"
    fits = found is None or ".".join(found.split(".")[:2]) in accepted
    return Finding("CANN", state, "" if fits else f"install CANN {accepted[-1]}, or another {name}")


def probe(name: str) -> dict[str, Any]:
    """What a framework reports about itself: `version`, `count` of `devices`, `dtypes`, and where there are some
    `cann`, and what is `lacking` to compile kernels.

    Raises:
        RuntimeError: the framework cannot be imported, crashes or hangs. The message is its last line of output.
    """
    command = [sys.executable, *run_module.command(f"tandem.backends.{name}.devices")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer after {PROBE_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def missing_plugin(framework: Framework, devices: str) -> str:
    """What to do when the machine has an accelerator that the framework does not see; empty for nothing to do."""
    if not devices.endswith("cpu"):
        return ""
    if shutil.which("npu-smi"):
        return f"this machine has Ascend devices: {framework.device_plugin}"
    if shutil.which("nvidia-smi") and framework is TORCH:
        return "this machine has NVIDIA devices: pip install a CUDA build of torch"
    return ""


def examine_optional(name: str) -> Finding:
    purpose, extra = OPTIONAL[name]
    version = version_of(name)
    return Finding(f"{name} ({purpose})", version or "missing", "" if version else f"pip install 'tandem-llm[{extra}]'")


def examine_machine() -> Iterator[Finding]:
    yield Finding("processors", f"{os.cpu_count()}; OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'is not set')}")
    yield Finding("memory", f"{memory_bytes() / 1e9:.1f} GB")
    yield Finding("disk here", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free in {os.getcwd()}")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
