"""A device without enough memory: an error that names the settings which need less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.training.start.room import ways_to_less_memory

# The frameworks raise RuntimeError with words of their own: PyTorch's allocators for CPU, CUDA and NPU; MindSpore's.
_WORDS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|memory (?:is not|isn't|not) enough"
    r"|bad_alloc|alloc(?:ate)? memory failed|failed to alloc(?:ate)? memory|malloc .*fail",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the machine, has too little memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


@contextmanager
def naming_less_memory(settings: Settings) -> Iterator[None]:
    """Turn an error about memory inside the block into a UserError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        place = f"{where}: " if (where := getattr(error, "place", None)) else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{place}out of memory: {reason}. Try {'; or '.join(ways_to_less_memory(settings))}. `tandem plan` says "
            f"what takes the room"
        ) from error
