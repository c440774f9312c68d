"""Which files an input names: a file, the data of a folder, or what fits a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from tandem.data.kinds import MOST_NAMES, REJECTS_SUFFIX
from tandem.data.record import is_record
from tandem.data.sources.compressed import has_suffix
from tandem.data.sources.readers import SUFFIXES, SUFFIXES_IN_WORDS
from tandem.errors import UserError
from tandem.files.real import check_real

_MOST_LOOKED_AT = 10_000  # files below a folder, when an error tells where its data lie
_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, in each folder of checkpoints
_MOST_BYTES = 1 << 24  # of a file that describes data
# Files that describe the data next to them -> a key that such a file has: the datasets library writes all three.
_DESCRIPTIONS = {"state.json": "_data_files", "dataset_dict.json": "splits", "dataset_info.json": "features"}


def expand_input(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that `inputs` name. Each is a file, a folder (its data files, sorted by name) or a glob pattern.

    Folders and patterns pass over what an earlier run wrote there, and over files that only describe data.

    Raises:
        UserError: an input has no data file. If a folder's data lie deeper, the message has the pattern for them.
    """
    files: list[Path] = []
    for entry in inputs:
        given, path = os.fspath(entry), Path(entry)
        if path.is_dir():
            if other := of_another_kind(path):
                raise UserError(f"input {given!r} {other}")
            matches = sorted(file for file in path.iterdir() if _is_data(file))
        elif path.is_file():
            matches = [path]
        else:
            named = sorted(Path(name) for name in glob.glob(given, recursive=True) if os.path.isfile(name))
            matches = [file for file in named if not _is_no_input(file)]
        if not matches:
            raise UserError(
                _where_it_lies(path)
                or f"input {given!r}: no such file, and no folder or pattern with files of {SUFFIXES_IN_WORDS}"
            )
        files += matches
    for file in files:
        check_real(file)
        if not has_suffix(file, SUFFIXES):
            raise UserError(f"{file}: unknown kind of file; expected one of {SUFFIXES_IN_WORDS}")
    return files


def of_another_kind(folder: Path) -> str | None:
    """In words, what a folder is that holds a model or a run, whose small files would be read as data; else None."""
    if (folder / _TRACKER).exists():
        return "is the folder of a run or a checkpoint, and not of data"
    config = folder / "config.json"
    if config.is_file() and config.stat().st_size < _MOST_BYTES and b'"model_type"' in config.read_bytes():
        return "is the folder of a model, and not of data"
    return None


def _is_data(file: Path) -> bool:
    """Whether a file of a folder is read. A link to nothing is, so that it is named."""
    return has_suffix(file, SUFFIXES) and not file.is_dir() and not _is_no_input(file)


def _is_no_input(file: Path) -> bool:
    """Whether an earlier run wrote this file next to its input, or it only describes the data next to it."""
    return (
        file.suffix in (".bin", ".idx")
        or file.name.endswith(REJECTS_SUFFIX)
        or (file.suffix == ".json" and file.is_file() and (is_record(file) or _is_description(file)))
    )


def _is_description(file: Path) -> bool:
    """Whether a file is what the datasets library, or LLaMA-Factory, writes about data.

    Its name alone does not show it: data may have the name `state.json`.
    """
    if file.name not in _DESCRIPTIONS or file.stat().st_size > _MOST_BYTES:
        return False
    try:
        content = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError:
        return False
    if not isinstance(content, dict):
        return False
    return _DESCRIPTIONS[file.name] in content or (file.name == "dataset_info.json" and _names_datasets(content))


def _names_datasets(content: Mapping[str, Any]) -> bool:
    """Whether this is a `dataset_info.json` of LLaMA-Factory: an object for each dataset."""
    return all(isinstance(entry, dict) for entry in content.values())


def _where_it_lies(folder: Path) -> str:
    """The whole message about a folder whose data lie in folders below it; "" where there are none."""
    if not folder.is_dir():
        return ""
    found = sorted(islice(filter(_is_data, _below(folder)), _MOST_LOOKED_AT))
    if not found:
        return ""
    patterns = dict.fromkeys(str(folder / "**" / f"*{_suffix(file)}") for file in found)
    folders = [str(parent) for parent in dict.fromkeys(file.parent for file in found)]
    more = ", ..." if len(folders) > MOST_NAMES else ""
    return (
        f"input {str(folder)!r}: its data lie deeper, in {', '.join(folders[:MOST_NAMES])}{more}; name one of these "
        f"folders, or give the pattern {' '.join(repr(pattern) for pattern in patterns)} for all"
    )


def _below(folder: Path) -> Iterator[Path]:
    return islice(folder.rglob("*"), _MOST_LOOKED_AT)


def _suffix(file: Path) -> str:
    """How a file's name ends, as it is written there: `.jsonl.gz`, or `.JSONL`."""
    longest = max((suffix for suffix in SUFFIXES if has_suffix(file, (suffix,))), key=len)
    return file.name[-len(longest) :]
