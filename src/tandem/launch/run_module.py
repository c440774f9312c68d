"""python run_module.py MODULE WORDS...: as `python -m MODULE WORDS...`, but imports nothing from the working folder.

A file there, such as random.py or yaml.py, would otherwise be taken for the library of that name.
"""

from __future__ import annotations

import os
import runpy
import sys


def command(module: str, *words: str) -> list[str]:
    """The words behind `python` that run a module."""
    return [__file__, module, *words]


def _run(words: list[str]) -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    tandem = os.path.dirname(os.path.dirname(here))
    sys.path[:] = [path for path in sys.path if path != here]
    if tandem not in sys.path:  # it was imported from the working folder
        sys.path.insert(0, tandem)
    sys.argv[:] = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(sys.argv[1:])
