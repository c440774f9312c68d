"""The models that a server answers with, under their names."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tandem.inference.chat import Model


@dataclass(frozen=True)
class Served:
    """A model under its name."""

    name: str
    model: Model
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.model.stop_ids())

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer together."""
        return self.model.engine.config.max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """As /v1/models tells it. `max_model_len` is vLLM's word."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tandem",
            "max_model_len": self.most_tokens,
        }
