"""What the launcher says of the world that it has started."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tandem.errors import UserError

# torchrun sets the first, msrun the others, in every process that it starts
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "MS_WORKER_NUM", "RANK_SIZE")


def require_single_process(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError when this process is one of several: each would train, and save, the whole model."""
    for name in WORLD_SIZE_VARIABLES:
        size = environment.get(name, "1")
        if size != "1":
            raise UserError(
                f"{name}={size}: training runs in one process so far (docs/limits.md); "
                f"launch one process (NPUS_PER_NODE=1 NNODES=1 in the example scripts)"
            )
