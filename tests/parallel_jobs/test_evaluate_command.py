"""`tandem evaluate` on two processes prints what it prints on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from frameworks import require_framework
from launchers import launcher
from workspace import Workspace

LAYOUTS = ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "")


def test_h5_the_loss_is_the_same_at_every_layout(workspace: Workspace, tmp_path: Path) -> None:
    """H5, J5: both sets, whole, although two data ranks get different numbers of micro-batches."""
    require_framework("torch")
    sets = [f"text={workspace.text}_text_document", f"chat={workspace.instructions}"]
    words = ["evaluate", str(workspace.hf), *sets, "--seq-length", "32", "--micro-batch-size", "3"]
    alone = table([sys.executable, "-m", "tandem", *words])
    assert [name for name, *_ in alone] == ["text", "chat"]
    for layout in LAYOUTS:
        assert table([*launcher("torch", 2), "-m", "tandem", *words, *layout.split()]) == alone, layout


def table(command: list[str]) -> list[tuple[str, ...]]:
    """Rows of the printed table: set, loss to 6 digits, perplexity, tokens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"│ (\w+) +│ +([\d.]+)\d\d │ +([\d.]+)\d\d │ +([\d,]+) │", done.stdout)
