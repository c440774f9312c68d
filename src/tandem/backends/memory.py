"""Memory of a process, for backends that compute on the CPU."""

from __future__ import annotations

import resource


def process_peak() -> int:
    """Bytes that this process had in memory at the worst moment so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
