"""Start a job under supervision, as `tandem COMMAND --nproc-per-node` does, of a script or module of any kind.

python supervised.py FRAMEWORK PROCESSES WORDS...     (FRAMEWORK plain: `plain_launcher`)
"""

from __future__ import annotations

import sys

import plain_launcher

from tandem.backends import launcher_of
from tandem.launch.machines import Machines
from tandem.launch.supervisor import launch

if __name__ == "__main__":
    framework, processes, *words = sys.argv[1:]
    launcher = plain_launcher.launcher if framework == "plain" else launcher_of(framework)
    end = launch(Machines(nproc_per_node=int(processes)), launcher, words)
    if end.text:
        print(end.text, file=sys.stderr)
    sys.exit(end.code)
