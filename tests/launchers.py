"""Starting a job of several processes with the framework's own launcher, or with tandem's."""

from __future__ import annotations

import sys
from pathlib import Path

SUPERVISED = Path(__file__).with_name("parallel_jobs") / "supervised.py"


def launcher(framework: str, processes: int, *, forked: bool = False) -> list[str]:
    """What goes before a script, or before `-m` and a module, to run it as so many processes.

    Args:
        forked: by a launcher of the tests' own, `forking_launcher`, which takes much less time.
    """
    return [sys.executable, str(SUPERVISED), "forked-" * forked + framework, str(processes)]
