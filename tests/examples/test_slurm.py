"""The Slurm example on two machines, both here, with a stand-in for srun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts import EXAMPLES

STAND_INS = {
    # As Slurm's: what it runs is killed at a SIGTERM, and when a machine fails.
    "srun": """#!/bin/bash
set -m
while [[ "$1" == --* ]]; do shift; done
end() { for task in "${tasks[@]}"; do kill -KILL -- "-$task" 2> /dev/null; done; }
trap end TERM
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
for _ in 0 1; do
    wait -n || { code="${code:-$?}"; end; }
done
exit "${code:-0}"
""",
    "scontrol": "#!/bin/bash\necho first; sleep 0.1; echo second\n",  # a reader that left after a line would end it
    "python": """#!/bin/bash
trap 'sleep $NODE_RANK; echo "$NODE_RANK saved"; exit 75' TERM
echo > "$FOLDER/started_$NODE_RANK"
for _ in {1..600}; do sleep 0.1; done
""",
}
SAYS_ITS_NUMBER = 'echo "$NODE_RANK of $NNODES x $NPUS_PER_NODE at $MASTER_ADDR:$MASTER_PORT"'
FAILS = "((NODE_RANK == 0)) || exit 3; sleep 100"
TRAINS = f'source {EXAMPLES}/common/logged.sh; logged "$FOLDER/log_$NODE_RANK" python -m tandem pretrain'


def start(folder: Path, script: str | None = None, **stand_ins: str) -> subprocess.Popen[str]:
    """The job, with `script` in place of a training script; None leaves it the one that it has."""
    texts = {**STAND_INS, **stand_ins, "script.sh": f"#!/bin/bash\nset -euo pipefail\n{script}\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "examples").symlink_to(EXAMPLES)
    return subprocess.Popen(
        ["bash", "examples/slurm/pretrain_qwen3.slurm"],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "FOLDER": str(folder),
            "SCRIPT": "" if script is None else str(folder / "script.sh"),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "first,second",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_machine_runs_the_script_as_its_number(tmp_path: Path) -> None:
    job = start(tmp_path, SAYS_ITS_NUMBER)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == ["0 of 2 x 8 at first:6011", "1 of 2 x 8 at first:6011"]


def test_the_batch_of_its_own_script_divides_over_all_processes(tmp_path: Path) -> None:
    """The script alone has one for a machine of eight."""
    said = '#!/bin/bash\nwhile (($#)); do [[ $1 != --global-batch-size ]] || echo "batch $2"; shift; done\n'
    job = start(tmp_path, python=said)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (0, "")
    assert out.count("batch 16\n") == 2


def test_the_code_of_a_machine_that_fails_is_the_jobs(tmp_path: Path) -> None:
    job = start(tmp_path, FAILS)
    job.communicate(timeout=60)
    assert job.returncode == 3


@pytest.mark.skipif(shutil.which("pkill") is None, reason="needs pgrep and pkill, as the job does")
def test_before_its_time_is_up_every_machine_is_told_to_save_and_waited_for(tmp_path: Path) -> None:
    job = start(tmp_path, TRAINS)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started_*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (75, "")
    assert sorted(out.splitlines()) == ["0 saved", "1 saved"]
