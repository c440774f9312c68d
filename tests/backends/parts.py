"""Where a part of a backend stands: MindSpore's kernels have a folder for each device."""

from __future__ import annotations

import importlib
from types import ModuleType

FOLDERS = {("mindspore", "loss"): "compute.cpu."}


def import_part(framework: str, name: str) -> ModuleType:
    return importlib.import_module(f"tandem.backends.{framework}.{FOLDERS.get((framework, name), '')}{name}")
