"""How long ranks on Ascend wait for each other."""

from __future__ import annotations

import os

LEAST, MOST = 120, 7200  # seconds that HCCL takes for a connection
MESSAGE = 1800  # its own seconds for a message: devices may compile for long before they send one


def wait_for(minutes: float) -> None:
    """Let HCCL wait as long as `--distributed-timeout-minutes` says, or as it does, unless its own variables say it.

    Without them it waits 2 minutes for a connection, and 30 for a message. Source: CANN's documents of
    HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT.
    """
    seconds = max(1, round(60 * minutes))
    os.environ.setdefault("HCCL_CONNECT_TIMEOUT", str(min(max(seconds, LEAST), MOST)))
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(max(seconds, MESSAGE)))
