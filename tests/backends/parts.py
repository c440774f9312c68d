"""Where a part of a backend stands: MindSpore's kernels have a folder for each device."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import pytest

FOLDERS = {("mindspore", "loss"): "compute.cpu."}


def import_part(framework: str, name: str) -> ModuleType:
    return importlib.import_module(f"tandem.backends.{framework}.{FOLDERS.get((framework, name), '')}{name}")


def set_logits_chunk_bytes(monkeypatch: pytest.MonkeyPatch, framework: str, size: int) -> None:
    """Let a chunk of logits have at most `size` bytes, on CPU."""
    if framework == "mindspore":
        monkeypatch.setattr(import_part(framework, "loss"), "LOGITS_CHUNK_BYTES", size)
        return
    kernels = importlib.import_module("tandem.backends.torch.compute.sets").KERNELS
    monkeypatch.setitem(kernels, "cpu", dataclasses.replace(kernels["cpu"], logits_chunk_bytes=size))
