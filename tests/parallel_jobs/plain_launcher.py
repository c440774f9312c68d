"""A launcher without a framework: starts N ranks in sessions of their own, as msrun does, and waits for all.

python plain_launcher.py N WORDS...
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem.launch.machines import Machines


def launcher(machines: Machines, folder: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, __file__, str(machines.processes), *words], {}


if __name__ == "__main__":
    size = int(sys.argv[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv[2:]],
            env={**os.environ, "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(size)
    ]
    sys.exit(max(abs(rank.wait()) for rank in ranks))
