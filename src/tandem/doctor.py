"""`tandem doctor`: what is here, what is missing, and the command that installs it."""

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

from tandem.frameworks import FRAMEWORKS, TORCH, Framework

PYTHON = ((3, 10), (3, 12))  # first and last minor version
REQUIRED = ("numpy", "ml_dtypes", "tokenizers", "orjson", "pyarrow", "jinja2", "pyyaml", "rich")
# Package -> what it is for, and the extra that installs it.
OPTIONAL = {
    "gigatoken": ("fast tokenising", "fast"),
    "tensorboard": ("--tensorboard-dir", "tensorboard"),
    "wandb": ("--wandb-project", "wandb"),
}
PROBE_SECONDS = 120  # a first import may compile and write caches


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `mend` is what to do about it, empty when all is well."""

    what: str
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings; `blockers` are why no run could start here."""

    findings: list[Finding]
    blockers: list[str]


def examine() -> Diagnosis:
    """Look at Python, packages, frameworks with their devices, launchers and the machine."""
    python, packages = examine_python(), [examine_package(name) for name in REQUIRED]
    frameworks = [finding for framework in FRAMEWORKS for finding in examine_framework(framework)]
    blockers = [f"{finding.what}: {finding.mend}" for finding in [python, *packages] if finding.mend]
    names = [framework.name for framework in FRAMEWORKS]
    if all(finding.mend for finding in frameworks if finding.what in names):
        blockers.append("no framework works: " + "; ".join(finding.mend for finding in frameworks if finding.mend))
    optional = [examine_optional(name) for name in OPTIONAL]
    return Diagnosis([python, *packages, *frameworks, *optional, *examine_machine()], blockers)


def examine_python() -> Finding:
    first, last = ((f"{major}.{minor}") for major, minor in PYTHON)
    good = PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]
    return Finding("python", platform.python_version(), "" if good else f"use Python {first} to {last}")


def examine_package(name: str) -> Finding:
    version = version_of(name)
    if version is None:
        return Finding(name, "missing", f"pip install {name}")
    if name == "numpy" and int(version.split(".")[0]) >= 2 and version_of("mindspore") is not None:
        return Finding(name, version, "pip install 'numpy<2', which MindSpore needs")
    return Finding(name, f"{version}; needs {needed}" if (needed := required(name)) else version)


def required(name: str) -> str | None:
    """What this package asks of another, as pip takes it; None for any version, or where it is not installed itself."""
    try:
        lines = importlib.metadata.requires("tandem-llm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    own = [line for line in lines if re.match(rf"{re.escape(name)}\s*[<>=!~]", line, re.IGNORECASE)]
    return own[0].partition(";")[0].strip() if own else None


def examine_framework(framework: Framework) -> Iterator[Finding]:
    """The framework, imported in a process of its own, its devices, and its launcher."""
    name = framework.name
    if version_of(name) is None:
        yield Finding(name, "missing", f"pip install 'tandem-llm[{name}]'")
        return
    try:
        found = probe(name)
    except RuntimeError as error:
        yield Finding(
            name, f"{version_of(name)}, but it does not start: {error}", f"pip install --force-reinstall {name}"
        )
        return
    yield Finding(name, f"{found['version']}; needs {framework.requirement}", framework.untried() or "")
    yield Finding(
        f"{name} devices", f"{found['devices']}; {found['dtypes']}", missing_plugin(framework, found["devices"])
    )
    launcher = framework.launcher
    on_path = shutil.which(launcher) or shutil.which(launcher, path=os.path.dirname(sys.executable))
    yield Finding(launcher, on_path or "missing", "" if on_path else f"pip install --force-reinstall {name}")


def probe(name: str) -> dict[str, str]:
    """What a framework says of itself.

    Raises:
        RuntimeError: it cannot be imported, crashes or hangs; with its last line.
    """
    command = [sys.executable, "-m", f"tandem.backends.{name}.devices"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer after {PROBE_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def missing_plugin(framework: Framework, devices: str) -> str:
    """What to do when the machine has an accelerator that the framework does not see."""
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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("processors", f"{os.cpu_count()}; OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'is not set')}")
    yield Finding("memory", f"{memory / 1e9:.1f} GB")
    yield Finding("disk here", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free in {os.getcwd()}")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
