"""`--deterministic-mode` on MindSpore."""

from __future__ import annotations

import functools

import mindspore as ms


@functools.cache
def make_deterministic() -> None:
    """Make Ascend's operators and collectives add in a fixed order. Call it before the device is used.

    It has no effect on the CPU, whose operations are deterministic at the same number of threads.
    """
    ms.set_deterministic(True)
