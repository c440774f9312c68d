"""Start a job under supervision, as `tandem COMMAND --nproc-per-node` does, of a script or module of any kind.

python supervised.py FRAMEWORK PROCESSES WORDS...     (FRAMEWORK plain: `plain_launcher`;
forked-torch, forked-mindspore: `forking_launcher`)
"""

from __future__ import annotations

import sys
from pathlib import Path

import plain_launcher

sys.path.append(str(Path(__file__).resolve().parents[1]))

import forking_launcher
from tandem.backends import launcher_of
from tandem.launch.machines import Machines
from tandem.launch.supervisor import launch

if __name__ == "__main__":
    framework, processes, *words = sys.argv[1:]
    if framework == "plain":
        launcher = plain_launcher.launcher
    elif framework.startswith("forked-"):
        launcher = forking_launcher.launcher_for(framework.removeprefix("forked-"))
    else:
        launcher = launcher_of(framework)
    end = launch(Machines(nproc_per_node=int(processes)), launcher, words)
    if end.text:
        print(end.text, file=sys.stderr)
    sys.exit(end.code)
