"""`--deterministic-mode` on PyTorch."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Before the device is used: only algorithms that give the same bits each time; one that has none raises.

    Source: PyTorch's notes on reproducibility. The CPU's operations are deterministic without it, at the same number
    of threads.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory before it is written
