"""`--deterministic-mode` on PyTorch."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Use only algorithms that give the same bits each time. Call it before the device is used.

    An operation without such an algorithm raises. The CPU's operations are deterministic anyway, at the same number of
    threads. Source: PyTorch's notes on reproducibility.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory before it is written
