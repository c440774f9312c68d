"""Merging of datasets that were preprocessed in parts, grouped by what their names have in common."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tandem.data.indexed import merge
from tandem.data.record import read_record, record_path, require_own, write_record
from tandem.errors import UserError

_MADE_ALIKE = ("append_eod", "pad_to_multiple_of", "pack", "neat_pack", "seq_length", "train_turns")  # of the options


def merge_groups(folder: str | os.PathLike[str], keys: Sequence[str], output_prefix: str) -> list[str]:
    """For each key, merge every `.bin/.idx` pair in `folder` whose name holds the key, by name, into
    `{output_prefix}_{key}`. Where the parts have records, so has what they become.

    Returns:
        The prefixes written.

    Raises:
        UserError: no pair matches a key, one half of a pair is missing, or the records say that parts do not belong
            together.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--merge-group-keys: --input {os.fspath(folder)} is no folder; name the one with the parts")
    groups = {f"{output_prefix}_{key}": _parts(Path(folder), key, f"{output_prefix}_{key}") for key in keys}
    for parts in groups.values():
        _require_one_making(parts)
    earlier = {path for output in groups for path in _earlier_record(output, output_prefix)}
    merged = _merged_record(groups, output_prefix)
    if merged:
        require_own(output_prefix, merged.files)
    for path in earlier:
        path.unlink()  # it must never meet the new data
    for output, parts in groups.items():
        merge(parts, output)
    if merged:
        write_record(output_prefix, merged.files, merged.content)
    return list(groups)


def _parts(folder: Path, key: str, output: str) -> list[Path]:
    """The prefixes that are merged into `output`."""
    found = sorted(path.with_suffix("") for path in folder.glob("*.idx") if key in path.stem)
    parts = [part for part in found if part.absolute() != Path(output).absolute()]
    if not parts:
        raise UserError(f"--merge-group-keys {key}: no .bin/.idx pair in {folder} has it in its name")
    lonely = [path for path in folder.glob("*.bin") if key in path.stem and not path.with_suffix(".idx").exists()]
    if lonely:
        raise UserError(f"{lonely[0]}: its .idx is missing; copy both files, or remove it")
    return parts


class _Record(NamedTuple):
    """What `write_record` takes."""

    files: dict[str, str]
    content: dict[str, Any]


def _merged_record(groups: Mapping[str, Sequence[Path]], output_prefix: str) -> _Record | None:
    """That of all groups; None where a part has none, or where not every pair that a record speaks for is merged, in
    the same order as the others."""
    files: dict[str, str] = {}
    records: dict[Path, dict[str, Any]] = {}
    for output, parts in groups.items():
        found = dict(record for record in map(read_record, parts) if record)
        if len(found) != len(parts) or list(records or found) != list(found):
            return None
        keys = {_key_of(record, part) for record, part in zip(found.values(), parts)}
        if len(keys) != 1:
            return None
        files[keys.pop()] = os.path.basename(output)
        records = found
    if any(set(record["files"]) != set(files) for record in records.values()):
        return None
    first, *_ = records.values()
    inputs = [name for record in records.values() for name in record["options"]["input"]]
    content = {
        "tokenizer": first["tokenizer"],
        "template": first["template"],
        "options": {**first["options"], "input": inputs, "output_prefix": output_prefix},
        "sources": [source for record in records.values() for source in record["sources"]],
        "counts": _sums([record["counts"] for record in records.values()]),
        "merged": [str(path) for path in records],
    }
    return _Record(files, content)


def _key_of(record: Mapping[str, Any], part: Path) -> str:
    """Which of a record's pairs a part is."""
    return next(key for key, name in record["files"].items() if name == part.name)


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in counts[0] if name != "dropped"]
    dropped: Counter[str] = sum((Counter(count["dropped"]) for count in counts), Counter())
    return {**{name: sum(count.get(name, 0) for count in counts) for name in names}, "dropped": dict(dropped)}


def _require_one_making(parts: Sequence[Path]) -> None:
    """Raise UserError when the parts' records, where they have some, say that they do not belong together."""
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


def _earlier_record(output: str, output_prefix: str) -> list[Path]:
    """The record of an earlier merge, if there is one.

    Raises:
        UserError: the record of other data would speak for what the parts become.
    """
    found = read_record(output)
    if found is None:
        return []
    if found[0] != record_path(output_prefix) or "merged" not in found[1]:
        raise UserError(f"{found[0]}: speaks for the data that lie there; choose another --output-prefix, or remove it")
    return [found[0]]
