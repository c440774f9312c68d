"""`make quickstart` with a wrong Python says so, and leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('[ "$1" = --version ] && echo Python 3.9.1; [ "$1" = --version ]', "is Python 3.9.1: expected Python 3.10"),
        ('[ "$1" = -c ] && exit 0; mkdir .venv; exit 1', "Error 1"),  # as without ensurepip
    ],
)
def test_a_wrong_python_leaves_nothing(script: str, said: str, tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "quickstart", "PYTHON=./python"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert said in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "python"]
