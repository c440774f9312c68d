"""What a data path is that names no dataset: in words, with the step that helps."""

from __future__ import annotations

import glob
import os
import shlex
from pathlib import Path

from tandem.data.kinds import dataset_of_pair, datasets_in_folder_of
from tandem.data.record import read_record
from tandem.data.sources.compressed import has_suffix
from tandem.data.sources.files import of_another_kind
from tandem.data.sources.readers import SUFFIXES
from tandem.errors import UserError
from tandem.files.real import near_names


def no_dataset(data_path: str, first_pair: str | None = None) -> UserError:
    """The error for a data path without a dataset.

    Args:
        first_pair: prefix of the files that were expected; by default the path itself.
    """
    for describe in (_one_file_of_a_pair, _raw_file, _folder, _copied_in_part):
        if text := describe(data_path):
            return UserError(f"{data_path}: {text}")
    step = datasets_in_folder_of(data_path) or near_names(data_path)
    return UserError(
        f"{first_pair or data_path}.idx: no such file, and no raw file with the name {data_path}; give the prefix that "
        f"`tandem preprocess` wrote{step}"
    )


def preprocess_first(data_path: str) -> str:
    """What helps where raw data are given, and preprocessed ones are needed."""
    command = f"tandem preprocess --input {shlex.quote(data_path)} --output-prefix PREFIX"
    return f"preprocess it first with `{command} --tokenizer-name-or-path MODEL`, and give the prefix that it names"


# Each of the functions below says what `data_path` is, and what helps; None when it is something else.


def _one_file_of_a_pair(data_path: str) -> str | None:
    if not data_path.endswith((".bin", ".idx")) or not os.path.exists(data_path):
        return None
    whole = dataset_of_pair(data_path[:-4])
    return f"expected a prefix: give {whole}" if whole else f"expected a prefix: leave out {data_path[-4:]}"


def _raw_file(data_path: str) -> str | None:
    matches = [data_path] if os.path.isfile(data_path) else glob.glob(data_path, recursive=True)
    files = [file for file in matches if os.path.isfile(file)]
    if not files:
        return None
    if not any(has_suffix(Path(file), SUFFIXES) for file in files):
        return "is a file, and no data: expected the prefix that `tandem preprocess` wrote"
    return f"this is a raw file: {preprocess_first(data_path)}"


def _folder(data_path: str) -> str | None:
    if not os.path.isdir(data_path):
        return None
    if other := of_another_kind(Path(data_path)):
        return f"{other}: expected the prefix that `tandem preprocess` wrote"
    if listed := datasets_in_folder_of(os.path.join(data_path, "any")):
        return f"is a folder: give the prefix of a dataset{listed}"
    if any(has_suffix(file, SUFFIXES) for file in Path(data_path).iterdir()):
        return f"is a folder of raw files: {preprocess_first(data_path)}"
    return "is a folder without data: expected the prefix that `tandem preprocess` wrote"


def _copied_in_part(data_path: str) -> str | None:
    """Some files of a dataset whose record is there."""
    if (path_and_record := read_record(data_path)) is None:
        return None
    path, record = path_and_record
    prefixes = [os.path.join(os.path.dirname(data_path), name) for name in record["files"].values()]
    missing = [f"{prefix}.idx" for prefix in prefixes if not os.path.exists(f"{prefix}.idx")]
    if missing:
        return f"{path} names {missing[0]}, which is not there; copy all files"
    return f"give {' or '.join(prefixes)}, as {path} names them"
