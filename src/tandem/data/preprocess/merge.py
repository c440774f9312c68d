"""Merging of datasets that were preprocessed in parts, grouped by what their names have in common."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tandem.data.indexed import merging
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
    earlier = {path for output in groups for path in _earlier_record(output, output_prefix, groups)}
    merged = _merged_record(groups, output_prefix)
    if merged:
        require_own(output_prefix, merged.files)
    with merging(groups):
        for path in earlier:
            path.unlink()  # it must never meet the new data
    if merged:
        write_record(output_prefix, merged.files, merged.content)
    return list(groups)


def _parts(folder: Path, key: str, output: str) -> list[Path]:
    """The prefixes that are merged into `output`."""
    found = sorted(path.with_suffix("") for path in folder.glob("*.idx") if key in path.stem)
    parts = [part for part in found if part.resolve() != Path(output).resolve()]
    if not parts:
        raise UserError(f"--merge-group-keys {key}: no .bin/.idx pair in {folder} has it in its name")
    _require_no_part_twice(parts)
    lonely = [path for path in folder.glob("*.bin") if key in path.stem and not path.with_suffix(".idx").exists()]
    if lonely:
        raise UserError(f"{lonely[0]}: its .idx is missing; copy both files, or remove it")
    return parts


def _require_no_part_twice(parts: Sequence[Path]) -> None:
    """Raise UserError when a part is what an earlier merge made of another."""
    records = {part: found for part in parts if (found := read_record(part)) is not None}
    places = {str(path.resolve()) for path, _ in records.values()}
    for part, (_, record) in records.items():
        twice = places & {str(Path(path).resolve()) for path in record.get("merged", [])}
        if twice:
            raise UserError(
                f"{part}: an earlier merge made it of {', '.join(sorted(twice))}, which are here, too: their documents "
                f"would come twice; remove it, or merge in another folder"
            )


class _Record(NamedTuple):
    """What `write_record` takes."""

    files: dict[str, str]
    content: dict[str, Any]


def _merged_record(groups: Mapping[str, Sequence[Path]], output_prefix: str) -> _Record | None:
    """That of all groups; None where a part has none, where a record speaks for more than is merged, or where it would
    not be found, which names that end in `_document` see to."""
    files: dict[str, str] = {}
    merged: list[list[Path]] = []  # the records of each group, which must be the same in the same order
    records: dict[Path, dict[str, Any]] = {}
    for output, parts in groups.items():
        found = [read_record(part) for part in parts]
        known = dict(record for record in found if record)
        keys = {key for part in parts for record in known.values() for key in _keys_of(record, part)}
        if None in found or len(known) != len(parts) or len(keys) != 1 or not output.endswith("_document"):
            return None
        (key,) = keys
        if key in files:
            return None
        files[key] = os.path.basename(output)
        merged.append(list(known))
        records = known
    if any(paths != merged[0] for paths in merged) or any(set(r["files"]) != set(files) for r in records.values()):
        return None
    content = {
        "tokenizer": next(iter(records.values()))["tokenizer"],
        "template": next(iter(records.values()))["template"],
        "options": {**_shared([record["options"] for record in records.values()]), "output_prefix": output_prefix},
        "sources": [source for record in records.values() for source in record["sources"]],
        "counts": _sums([record["counts"] for record in records.values()]),
        "merged": list(map(str, records)),
    }
    return _Record(files, content)


def _keys_of(record: Mapping[str, Any], part: Path) -> list[str]:
    """Which of a record's pairs a part is, if it is one."""
    return [key for key, name in record["files"].items() if name == part.name]


def _shared(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of all; of the other options those that are the same in all, None for those that differ."""
    names = dict.fromkeys(name for option in options for name in option)
    shared = {name: options[0].get(name) for name in names}
    for name, value in shared.items():
        if any(option.get(name) != value for option in options):
            shared[name] = None
    return {**shared, "input": [name for option in options for name in option["input"]]}


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dropped: Counter[str] = sum((Counter(count["dropped"]) for count in counts), Counter())
    names = dict.fromkeys(name for count in counts for name in count if name != "dropped")
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


def _earlier_record(output: str, output_prefix: str, outputs: Iterable[str]) -> list[Path]:
    """The record of an earlier merge, if there is one.

    Raises:
        UserError: the record of other data would speak for what the parts become, or that of an earlier merge speaks
            for more than the `outputs`.
    """
    found = read_record(output)
    if found is None:
        return []
    left = set(found[1]["files"].values()) - set(map(os.path.basename, outputs))
    if "merged" in found[1] and left:
        raise UserError(
            f"{found[0]}: speaks for {', '.join(sorted(left))}, too, which would lose their record; merge all of its "
            f"keys, or choose another --output-prefix"
        )
    if found[0] != record_path(output_prefix) or "merged" not in found[1]:
        raise UserError(f"{found[0]}: speaks for the data that lie there; choose another --output-prefix, or remove it")
    return [found[0]]
