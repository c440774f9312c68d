"""The Slurm example, with an srun that runs its command once per machine, here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from scripts import EXAMPLES

SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
for node in 0 1; do SLURM_NODEID=$node "$@"; done
"""


def test_every_machine_runs_the_script_as_its_number(tmp_path: Path) -> None:
    stand_ins = {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho first; sleep 0.1; echo second\n",  # a reader that left after a line would end it
        "script.sh": '#!/bin/bash\necho "$NODE_RANK of $NNODES x $NPUS_PER_NODE at $MASTER_ADDR:$MASTER_PORT"\n',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(EXAMPLES / "slurm/pretrain_qwen3.slurm")],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SCRIPT": str(tmp_path / "script.sh"),
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "first,second",
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["0 of 2 x 8 at first:6011", "1 of 2 x 8 at first:6011"]
