"""The record `{prefix}.json` next to a dataset says how it was made. Training refuses data that does not fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from typing import Any

import orjson

from tandem.data.kinds import KINDS
from tandem.data.templates.messages import Template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.files import sha256 as hashing

FORMAT = "tandem-dataset"
VERSION = 1
_BEGINNING = b'{\n  "format": "' + FORMAT.encode()  # how each file of `write_record` begins


def record_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.json")


def tokenizer_entry(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entry of a record that identifies a tokenizer."""
    return {"sha256": tokenizer.sha256, "length": len(tokenizer), "eos_token_id": tokenizer.eos_id}


def template_entry(template: Template) -> dict[str, Any]:
    """The entry of a record that identifies a prompt template and its thinking mode."""
    return {
        "prompt_type": template.name,
        "sha256": template.sha256,
        "enable_thinking": template.enable_thinking,
    }


@contextmanager
def source_entries(files: Sequence[Path]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Hash input files in a process of its own, and give a function that waits for their names, sizes and hashes.

    Leaving the context ends the process. The function raises UserError if a file cannot be read.
    """
    command = [sys.executable, "-I", "-S", hashing.__file__]
    with TemporaryFile() as names:
        names.write(b"\0".join(map(os.fsencode, files)))
        names.seek(0)
        # In a new session, which the terminal's Ctrl-C does not reach.
        with Popen(command, stdin=names, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as process:
            try:
                yield lambda: _entries(files, process)
            finally:
                process.kill()


def _entries(files: Sequence[Path], process: Popen[str]) -> list[dict[str, Any]]:
    hashes, errors = process.communicate()
    if process.returncode:
        raise UserError(f"an input file cannot be hashed: {errors.rstrip().rpartition(chr(10))[2]}")
    return [
        {"file": os.path.abspath(file), "bytes": file.stat().st_size, "sha256": sha256}
        for file, sha256 in zip(files, hashes.split())
    ]


def remove_record(prefix: str | os.PathLike[str], files: Mapping[str, str]) -> None:
    """Remove the record of an earlier run, before its data are replaced."""
    require_no_other_record(prefix, files)
    record_path(prefix).unlink(missing_ok=True)


def require_no_other_record(prefix: str | os.PathLike[str], files: Mapping[str, str]) -> None:
    """Raise UserError if the record would replace another file, such as the input, or the record of other data.

    `files` are the names of the `.bin/.idx` pairs, by key.
    """
    path = record_path(prefix)
    if not path.exists():
        return
    if not (path.is_file() and is_record(path)):
        raise UserError(f"{path}: is not a record, but the record would replace it; choose another --output-prefix")
    recorded = _load(path)["files"]
    if recorded != dict(files):
        raise UserError(
            f"{path}: is already the record of {', '.join(recorded.values())}. It cannot be the record of "
            f"{', '.join(files.values())} too; choose another --output-prefix"
        )


def write_record(prefix: str | os.PathLike[str], files: Mapping[str, str], content: Mapping[str, Any]) -> None:
    """Publish the record of `files` in one step."""
    path = record_path(prefix)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    header = {"format": FORMAT, "version": VERSION, "files": dict(files)}
    part.write_bytes(orjson.dumps({**header, **content}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    os.replace(part, path)


def read_record(data_path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """The path and the content of a dataset's record; None if there is none.

    The data path is the output prefix, or the prefix of one `.bin/.idx` pair.
    """
    for path in _candidates(os.fspath(data_path)):
        if not path.is_file() or not is_record(path):
            continue
        content = _load(path)
        if _covers(content, os.path.basename(os.fspath(data_path))):
            return path, content
    return None


def record_of(data_path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The content of a dataset's record; None if there is none."""
    path_and_record = read_record(data_path)
    return path_and_record[1] if path_and_record else None


def check_record(
    data_path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    template: Template | None = None,
    seq_length: int | None = None,
) -> str | None:
    """Compare a dataset's record with the run that will use it.

    Args:
        template: the run's template, when it fine-tunes.
        seq_length: the run's sequence length; packed rows must not be longer.

    Returns:
        None when all agrees. A notice when there is no record, as with files that Megatron made.

    Raises:
        UserError: names the first field that differs, with both values.
    """
    path_and_record = read_record(data_path)
    if path_and_record is None:
        unknown = "so nothing shows which tokenizer and template made it"
        for path in _candidates(os.fspath(data_path)):
            if path.is_file() and is_record(path):
                named = ", ".join(_load(path)["files"].values())
                return f"{os.fspath(data_path)}: {path} is the record of {named}, not of this data, {unknown}"
        return f"{os.fspath(data_path)}: the data has no record, {unknown}"
    path, record = path_and_record
    _compare(path, "tokenizer", record["tokenizer"], tokenizer_entry(tokenizer))
    if template is not None:
        if record["template"] is None:
            raise UserError(f"{path}: is plain text for pretraining; fine-tuning needs data made with a --prompt-type")
        _compare(path, "template", record["template"], template_entry(template))
    packed_length = record["options"]["seq_length"] if record["options"]["pack"] else None
    if packed_length is not None and seq_length is not None and packed_length > seq_length:
        raise UserError(
            f"{path}: options.seq_length is {packed_length}, this run's --seq-length is {seq_length}, so packed "
            f"rows would be cut; train with --seq-length {packed_length} or pack again"
        )
    return None


def _compare(path: Path, name: str, recorded: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if recorded.get(key) != value:
            raise UserError(
                f"{path}: {name}.{key} is {recorded.get(key)!r}, this run's is {value!r}; preprocess the data again, "
                f"or train with the {name} that made it"
            )


def is_record(path: Path) -> bool:
    """Whether a file is a record. Only its first bytes are read: a large data file may have the name of a record."""
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def _load(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not a valid record: {error}; preprocess again, or remove it") from None
    if content.get("version") != VERSION:
        raise UserError(f"{path}: record version {content.get('version')}, this version of tandem reads {VERSION}")
    return dict(content)


def _covers(record: Mapping[str, Any], name: str) -> bool:
    """Whether a data path of this name is one of the record's pairs, or their output prefix."""
    return name in record["files"].values() or all(
        file in [kind.pair(name, key) for kind in KINDS] for key, file in record["files"].items()
    )


def _candidates(data_path: str) -> Iterator[Path]:
    """Where the record of a data path may be. The record of `free_text_document` is `free.json`.

    A key may hold underscores, so each shorter name is tried.
    """
    folder, name = os.path.split(data_path)
    yield record_path(data_path)
    stem = name.removesuffix("_document")
    while stem != name and "_" in stem:
        stem = stem.rpartition("_")[0]
        yield record_path(os.path.join(folder, stem))
