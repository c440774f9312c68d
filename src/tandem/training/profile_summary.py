"""`profile/*.json` of a run: where the time of its profiled steps went, module by module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.checkpoints.publish import write_text_atomically

PROFILE_FOLDER = "profile"


def write_profile(folder: Path, first: int, last: int, seconds: Mapping[str, float], trace: str) -> None:
    """Keep the seconds of each module over the steps `first` to `last`, and where the framework's own trace lies."""
    content = {"first": first, "last": last, "seconds": dict(seconds), "trace": trace}
    path = folder / PROFILE_FOLDER / f"steps_{first}_{last}.json"
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def read_profiles(folder: Path) -> list[dict[str, Any]]:
    """Every summary of a run, by its first step."""
    files = (folder / PROFILE_FOLDER).glob("steps_*.json")
    return sorted((json.loads(file.read_text()) for file in files), key=lambda profile: profile["first"])
