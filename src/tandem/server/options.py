"""Options of `tandem serve`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem.config.settings import LaunchSettings
from tandem.inference.options import LoadOptions
from tandem.options import Options, PathText

API_KEY_VARIABLE = "TANDEM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Options of `tandem serve`."""

    model: LoadOptions
    compare: PathText | None = None
    """A second model, such as the one that was tuned, for the page to show side by side; without adapters."""
    served_model_name: tuple[str, ...] = ()
    """Names of the model, and of the second one; default: their folders' names."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that requests must have; default: the variable TANDEM_API_KEY, or none."""
    max_batch_size: int = 16
    """How many answers of a model are computed at a time; others wait."""
    max_waiting: int = 1024
    """How many more answers may wait; beyond that, requests are refused."""
    max_tokens: int = 2048
    """Longest answer in a chat where the request does not say, as far as the model has room."""
    max_body_mb: int = 8
    """Largest body of a request."""
    timeout_graceful_shutdown: int = 300
    """Seconds that running answers get to finish after SIGTERM or Ctrl-C."""
    launch: LaunchSettings = field(default_factory=LaunchSettings)

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None

    def problems(self) -> Iterator[str]:
        if not 0 <= self.port <= 65535:
            yield f"--port {self.port}: expected 0 to 65535"
        for name in ("max_batch_size", "max_tokens", "max_body_mb", "timeout_graceful_shutdown"):
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more"
        if self.max_waiting < 0:
            yield f"--max-waiting {self.max_waiting}: expected 0 or more"
        yield from self.launch.refused_dry_run()
        names, models = self.served_model_name, 1 if self.compare is None else 2
        if names and (len(names) != models or len(set(names)) != models or not all(names)):
            yield f"--served-model-name {' '.join(names)}: expected {models} different names, one for each model"
