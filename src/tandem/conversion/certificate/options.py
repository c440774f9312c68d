"""The options of `tandem verify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

from tandem.options import Options, PathText, positional

TOLERANCE = 2e-4  # of log-probabilities in fp32: programs differ by less, bfloat16 by more


@dataclass(frozen=True)
class VerifyOptions(Options):
    """Options of `tandem verify`."""

    folder: PathText | None = field(default=None, metadata=positional("FOLDER", flag_too=True, also=("--load",)))
    """Folder that `tandem export` wrote, or its certificate.json. With --url it may be left out when the server tells a
    folder on this machine."""
    _: KW_ONLY
    url: str | None = None
    """Ask the server at this address, instead of reading the folder with transformers."""
    model: str | None = None
    """Name of the model at the server; default: the only one that it serves."""
    api_key: str | None = None
    """Key for the server."""
    tolerance: float = TOLERANCE
    """Largest difference of a log-probability that passes."""
    timeout: float = 120.0
    """Seconds that one answer of the server may take."""

    def problems(self) -> Iterator[str]:
        if self.folder is None and self.url is None:
            yield "FOLDER (--folder) is required: a folder that `tandem export` wrote; or give --url"
        for name in ("model", "api_key"):
            if getattr(self, name) is not None and self.url is None:
                yield f"--{name.replace('_', '-')} belongs to --url, which is not given"
        for name in ("tolerance", "timeout"):
            if not getattr(self, name) > 0:
                yield f"--{name} {getattr(self, name)}: expected more than 0"
