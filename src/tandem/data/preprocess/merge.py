"""Merging datasets that were preprocessed in parts. Parts whose names contain the same key become one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tandem.data.indexed import merging
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.record import read_record, record_path, require_no_other_record, write_record
from tandem.errors import UserError

# options that must be the same in all parts
_EQUAL_OPTIONS = (
    *("append_eod", "eod_token", "special_tokens_in_text", "pad_to_multiple_of", "pack", "neat_pack", "seq_length"),
    "train_turns",
)


def merge_groups(folder: str | os.PathLike[str], keys: Sequence[str], output_prefix: str) -> list[str]:
    """For each key, merge the `.bin/.idx` pairs in `folder` whose names contain the key, into `{output_prefix}_{key}`.

    Parts are merged in the order of their names. If they have records, the result gets a record, too.

    Returns:
        The prefixes that were written.

    Raises:
        UserError: no pair matches a key, half of a pair is missing, or the records show that parts do not belong
            together.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"--merge-group-keys: --input {os.fspath(folder)} is not a folder; give the folder with the parts"
        )
    groups = {f"{output_prefix}_{key}": _parts(Path(folder), key, f"{output_prefix}_{key}") for key in keys}
    for parts in groups.values():
        _require_equal_options(parts)
    earlier = {path for output in groups for path in _earlier_record(output, output_prefix, groups)}
    merged = _merged_record(groups, output_prefix)
    if merged:
        require_no_other_record(output_prefix, merged.files)
    with merging(groups):
        for path in earlier:
            path.unlink()  # an old record must never be next to the new data
    if merged:
        write_record(output_prefix, merged.files, merged.content)
    return list(groups)


def _parts(folder: Path, key: str, output: str) -> list[Path]:
    """The prefixes that are merged into `output`."""
    pairs = sorted(path.with_suffix("") for path in folder.glob("*.idx") if key in path.stem)
    parts = [part for part in pairs if part.resolve() != Path(output).resolve()]
    if not parts:
        raise UserError(f"--merge-group-keys {key}: no .bin/.idx pair in {folder} has this key in its name")
    _require_no_part_twice(parts)
    incomplete = [path for path in folder.glob("*.bin") if key in path.stem and not path.with_suffix(".idx").exists()]
    if incomplete:
        raise UserError(f"{incomplete[0]}: its .idx is missing; copy both files, or remove this one")
    return parts


def _require_no_part_twice(parts: Sequence[Path]) -> None:
    """Raise UserError when an earlier merge made one part of others."""
    records = {part: entry for part in parts if (entry := read_record(part)) is not None}
    paths = {str(path.resolve()) for path, _ in records.values()}
    for part, (_, record) in records.items():
        repeated = paths & {str(Path(path).resolve()) for path in record.get("merged", [])}
        if repeated:
            raise UserError(
                f"{part}: an earlier merge made this of {', '.join(sorted(repeated))}, which are here, too. Their "
                f"documents would be in the result twice; remove this part, or merge in another folder"
            )


class _Record(NamedTuple):
    """The arguments of `write_record`."""

    files: dict[str, str]
    content: dict[str, Any]


def _merged_record(groups: Mapping[str, Sequence[Path]], output_prefix: str) -> _Record | None:
    """The record of all groups together; None where there can be none.

    There is none if a part has no record, or if a record is also of pairs that are not merged. Nor if the output's name
    does not end in `_document`: `read_record` would not find it.
    """
    files: dict[str, str] = {}
    merged: list[list[Path]] = []  # the records of each group, which must be the same in the same order
    records: dict[Path, dict[str, Any]] = {}
    for output, parts in groups.items():
        paths_and_records = [read_record(part) for part in parts]
        records = dict(pair for pair in paths_and_records if pair)
        keys = {key for part in parts for record in records.values() for key in _keys_of(record, part)}
        if None in paths_and_records or len(records) != len(parts) or len(keys) != 1:
            return None
        (key,) = keys
        if key in files or not output.endswith("_document"):
            return None
        files[key] = os.path.basename(output)
        merged.append(list(records))
    if any(paths != merged[0] for paths in merged) or any(set(r["files"]) != set(files) for r in records.values()):
        return None
    content = {
        "tokenizer": next(iter(records.values()))["tokenizer"],
        "template": next(iter(records.values()))["template"],
        "options": {**_shared([record["options"] for record in records.values()]), "output_prefix": output_prefix},
        "sources": [source for record in records.values() for source in record["sources"]],
        "counts": _sums([record["counts"] for record in records.values()]),
        "merged": list(map(os.path.abspath, records)),
    }
    return _Record(files, content)


def _keys_of(record: Mapping[str, Any], part: Path) -> list[str]:
    """The key of a part in a record, in a list; an empty list if the record is not of this part."""
    return [key for key, name in record["files"].items() if name == part.name]


def _shared(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a merged record: the inputs of all; other options are None where they differ."""
    names = dict.fromkeys(name for option in options for name in option)
    shared = {name: options[0].get(name) for name in names}
    for name, value in shared.items():
        if any(option.get(name) != value for option in options):
            shared[name] = None
    return {**shared, "input": [name for option in options for name in option["input"]]}


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of counts, and of counts by name, such as those of dropped documents by reason."""
    sums: dict[str, Any] = {}
    for name, value in (entry for count in counts for entry in count.items()):
        if isinstance(value, dict):
            sums[name] = dict(Counter(sums.get(name, {})) + Counter(value))
        else:
            sums[name] = sums.get(name, 0) + value
    return sums


def _require_equal_options(parts: Sequence[Path]) -> None:
    """Raise UserError when the parts' records, if they have any, show that they were made differently."""
    first: tuple[Path, dict[str, Any]] | None = None
    for part in parts:
        path_and_record = read_record(part)
        if path_and_record is None:
            continue
        path, record = path_and_record
        # An older record may lack an option, and was made with its default.
        options = {name: record["options"].get(name, getattr(PreprocessOptions, name)) for name in _EQUAL_OPTIONS}
        options |= {"tokenizer": record["tokenizer"], "template": record["template"]}
        first_path, first_options = first = first or (path, options)
        for name, value in options.items():
            if value != first_options[name]:
                raise UserError(
                    f"{path}: {name} is {value!r}, but {first_options[name]!r} in {first_path}; preprocess all parts "
                    f"with the same options"
                )


def _earlier_record(output: str, output_prefix: str, outputs: Iterable[str]) -> list[Path]:
    """The record of an earlier merge, in a list; an empty list if there is none.

    Raises:
        UserError: the record of other data would become the record of the output. Or an earlier merge's record is also
            of files that are not in `outputs`.
    """
    path_and_record = read_record(output)
    if path_and_record is None:
        return []
    path, record = path_and_record
    others = set(record["files"].values()) - set(map(os.path.basename, outputs))
    if "merged" in record and others:
        raise UserError(
            f"{path}: is also the record of {', '.join(sorted(others))}, which would have none after this merge; "
            f"merge all of its keys, or choose another --output-prefix"
        )
    if path != record_path(output_prefix) or "merged" not in record:
        raise UserError(f"{path}: is the record of other data; choose another --output-prefix, or remove it")
    return [path]
