"""Flags into the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse_dataclass(kind: type[T], command: str, description: str, argv: Sequence[str], default: T | None = None) -> T:
    """Flags, under their plain names with hyphens or underscores, into a dataclass (nested ones are groups)."""
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
    parsed: T = tyro.cli(  # type: ignore[assignment]
        kind, args=list(argv), prog=f"tandem {command}", description=description, default=default, config=config
    )
    return parsed
