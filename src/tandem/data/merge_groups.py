"""Merging of datasets that were preprocessed in parts, grouped by what their names have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tandem.data.indexed import merge
from tandem.errors import UserError


def merge_groups(folder: str | os.PathLike[str], keys: Sequence[str], output_prefix: str) -> list[str]:
    """For each key, merge every `.bin/.idx` pair in `folder` whose name holds the key, by name, into
    `{output_prefix}_{key}`.

    Returns:
        The prefixes written.

    Raises:
        UserError: no pair matches a key, or one half of a pair is missing.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--merge-group-keys: --input {os.fspath(folder)} is no folder; name the one with the parts")
    outputs = []
    for key in keys:
        parts = sorted(path.with_suffix("") for path in Path(folder).glob("*.idx") if key in path.stem)
        output = f"{output_prefix}_{key}"
        parts = [part for part in parts if part.absolute() != Path(output).absolute()]
        if not parts:
            raise UserError(f"--merge-group-keys {key}: no .bin/.idx pair in {os.fspath(folder)} has it in its name")
        tokens = (path for path in Path(folder).glob("*.bin") if key in path.stem)
        lonely = [path for path in tokens if not path.with_suffix(".idx").exists()]
        if lonely:
            raise UserError(f"{lonely[0]}: its .idx is missing; copy both files, or remove it")
        merge(parts, output)
        outputs.append(output)
    return outputs
