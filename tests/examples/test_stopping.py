"""A signal to a script reaches what it runs, which saves; all that it says is shown and kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts import EXAMPLES, HF2MCORE, PRETRAIN

# It catches what it is sent, as tandem does, and needs a moment to save.
STAND_IN = """#!/bin/bash
for name in TERM HUP USR1 USR2; do trap "stop $name" $name; done
stop() { sleep 0.3; echo "saved at $1"; exit 75; }
echo started
for _ in {1..600}; do sleep 0.1; done
"""


def start(folder: Path, script: str, **variables: str) -> subprocess.Popen[str]:
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / script)],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "started\n"
    return job


@pytest.mark.parametrize("script", [PRETRAIN["torch"], HF2MCORE])
@pytest.mark.parametrize(
    ("number", "heard"),
    [("TERM", "TERM"), ("INT", "TERM"), ("HUP", "HUP"), ("USR1", "USR1"), ("USR2", "USR2")],
)
def test_a_signal_to_a_script_is_passed_on(script: str, number: str, heard: str, tmp_path: Path) -> None:
    job = start(tmp_path, script)
    job.send_signal(signal.Signals[f"SIG{number}"])
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out) == (75, f"saved at {heard}\n")
    assert [path.read_text() for path in (tmp_path / "logs").iterdir()] == [f"started\nsaved at {heard}\n"]


@pytest.mark.parametrize("number", ["TERM", "INT"])
def test_a_signal_is_passed_on_however_early_it_comes(number: str, tmp_path: Path) -> None:
    """On a busy machine a command can begin to work before the script goes on to its next line."""
    slow = tmp_path / "slow.sh"
    slow.write_text("[[ $0 == */python ]] || { set -T; trap 'sleep 0.05' DEBUG; }\n")  # the script, not the command
    job = start(tmp_path, PRETRAIN["torch"], BASH_ENV=str(slow))
    job.send_signal(signal.Signals[f"SIG{number}"])
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out) == (75, "saved at TERM\n")


def test_ctrl_c_does_not_end_the_log(tmp_path: Path) -> None:
    """A terminal sends it to all processes."""
    job = start(tmp_path, PRETRAIN["torch"])
    time.sleep(0.2)
    os.killpg(job.pid, signal.SIGINT)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out) == (75, "saved at TERM\n")
