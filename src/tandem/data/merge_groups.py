"""Merging of datasets that were preprocessed in parts, grouped by what their names have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.data.indexed import merge
from tandem.data.record import read_record
from tandem.errors import UserError

_MADE_ALIKE = ("append_eod", "pad_to_multiple_of", "pack", "neat_pack", "seq_length", "train_turns")  # of the options


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
        _require_one_making(parts, output)
        merge(parts, output)
        outputs.append(output)
    return outputs


def _require_one_making(parts: Sequence[Path], output: str) -> None:
    """Raise UserError when the parts' records, where they have some, say that they do not belong together, or when the
    record of other data would speak for what they become."""
    stale = read_record(output)
    if stale is not None:
        raise UserError(f"{stale[0]}: speaks for the data that lie there; choose another --output-prefix, or remove it")
    first: tuple[Path, dict[str, Any]] | None = None
    for part in parts:
        found = read_record(part)
        if found is None:
            continue
        made = {name: found[1]["options"][name] for name in _MADE_ALIKE}
        made |= {"tokenizer": found[1]["tokenizer"], "template": found[1]["template"]}
        first = first or (found[0], made)
        for name, value in made.items():
            if value != first[1][name]:
                raise UserError(
                    f"{found[0]}: {name} is {value!r}, but {first[1][name]!r} in {first[0]}; only data that were made "
                    f"alike can be merged"
                )
