"""Starting a job of several processes with the framework's own launcher, or with tandem's."""

from __future__ import annotations

import sys
from pathlib import Path

SUPERVISED = Path(__file__).with_name("parallel_jobs") / "supervised.py"


def launcher(framework: str, processes: int) -> list[str]:
    """What goes before a script, or before `-m` and a module, to run it as so many processes."""
    return [sys.executable, str(SUPERVISED), framework, str(processes)]
