"""Raw files as training data: they are preprocessed once, into a cache, and later runs use the result."""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.data.kinds import kind_of
from tandem.data.preprocess.noticed import told
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.preprocess.spool import fingerprint
from tandem.data.record import read_record, record_of, record_path, source_entries, template_entry, tokenizer_entry
from tandem.data.sources.files import expand_input
from tandem.data.templates.catalog import get_template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.files.lock import BusyError
from tandem.files.publish import check_writable
from tandem.logs import log

_REVISION = 3  # to be increased when preprocessing begins to make other files of the same input
_NOT_IN_KEY = ("input", "output_prefix", "tokenizer_name_or_path", "workers", "log_interval")
_SECONDS_BETWEEN_CHECKS = 0.5
_IN_CACHE = re.compile(r"(\.preprocessed/)[0-9a-f]{16}(?=/)")
Wait = Callable[[Path], None]


def is_raw(data_path: str) -> bool:
    """Whether a data path names raw files, and not the prefix of preprocessed ones."""
    if data_path.endswith((".bin", ".idx")) or read_record(data_path) is not None or kind_of(data_path) is not None:
        return False
    return os.path.exists(data_path) or bool(glob.glob(data_path, recursive=True))


def without_keys(paths: Sequence[str]) -> list[str]:
    """Paths of `preprocess_once` without their keys: the same for all results of the same raw files."""
    return [_IN_CACHE.sub(r"\1", path) for path in paths]


def wait_for(record: Path) -> None:
    """Wait until another process has written `record`, however long that takes.

    The record is written last, and the key in its path says what it is of. So its existence is enough.
    """
    while not _is_whole(record):
        time.sleep(_SECONDS_BETWEEN_CHECKS)


def folder_in_cache(raw: str, cache: str | None) -> Path:
    """The folder with all results of a raw data path, each under its key. It need not be there."""
    path = Path(os.path.abspath(raw))
    name = re.sub(r"[*?[\]]", "_", path.name)
    nearest = next(parent for parent in path.parents if not glob.has_magic(str(parent)) or parent.exists())
    return Path(cache or nearest) / f"{name}.preprocessed"


def prefix_in_cache(options: PreprocessOptions, cache: str | None) -> str:
    """The output prefix of a raw data path. To find its key, all its files are hashed."""
    (raw,) = options.input
    return str(folder_in_cache(raw, cache) / _key(options) / "data")


def check_cache(raw: str, cache: str | None) -> None:
    """Raise UserError when the folder of a raw data path cannot be made in the cache. Nothing is made."""
    check_writable(folder_in_cache(raw, cache), "--data-cache-path" if cache else "without --data-cache-path,")


def is_in_cache(prefix: str) -> bool:
    """Whether the result with this output prefix is there, with all its files."""
    return _is_whole(record_path(prefix))


def preprocess_once(options: PreprocessOptions, cache: str | None, leader: bool = True, wait: Wait = wait_for) -> str:
    """Preprocess one raw data path into `{cache}/{name}.preprocessed/{key}`, unless that was done before.

    The key is a hash of the content of all files, the tokenizer, the template and the options. So different data are in
    different folders, and the same data are reused, also on another machine.

    Args:
        options: `input` is the raw data path; `output_prefix` is not used.
        cache: folder of the cache. None: the folder of the raw files; for a pattern, the nearest folder above it
            without a wildcard.
        leader: whether this process does the work. Each machine, or each shared disk, needs one leader; others wait.
        wait: called with the path of the record that the leader writes; returns when the record exists.

    Returns:
        The `--data-path` of the preprocessed data.

    Raises:
        UserError: as `preprocess`; or the cache cannot be written.
    """
    (raw,) = options.input
    options = replace(options, output_prefix=prefix_in_cache(options, cache))
    record = record_path(options.output_prefix)
    folder = record.parent
    if leader and not _is_whole(record):
        log.info("> preprocessing %s into %s", raw, folder)
        check_cache(raw, cache)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            summary = preprocess(options)
            ends = [f"each document ends with {summary.eod}"] if summary.eod else []
            for line in [*ends, *told(summary.unread, summary.readers, summary.noticed)]:
                log.info("> %s: %s", raw, line)
        except BusyError:  # another job preprocesses the same data
            wait(record)
    elif not leader:
        wait(record)
    content = record_of(options.output_prefix)
    if content is None:
        raise UserError(f"{record}: the process that preprocesses {raw} did not write this record; see its messages")
    if kind_of(options.output_prefix):
        return options.output_prefix
    return str(folder / next(iter(content["files"].values())))  # the data path of text is its pair


def _is_whole(record: Path) -> bool:
    """Whether a record exists, with all files that it names. Someone may have removed some of them."""
    content = record_of(str(record).removesuffix(".json"))
    return content is not None and all(
        (record.parent / f"{name}.{suffix}").is_file()
        for name in content["files"].values()
        for suffix in ("bin", "idx")
    )


def template_of_raw(options: PreprocessOptions, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The entry of the template in the record of the preprocessed data; None for plain text."""
    if options.prompt_type is None:
        return None
    return template_entry(get_template(options.prompt_type, options.thinking_mode, tokenizer))


def _key(options: PreprocessOptions) -> str:
    with source_entries(expand_input(options.input)) as entries:
        sources = entries()
    tokenizer = Tokenizer(options.tokenizer_name_or_path)
    identity = {
        "revision": _REVISION,
        "options": {name: value for name, value in options.recorded().items() if name not in _NOT_IN_KEY},
        "tokenizer": tokenizer_entry(tokenizer),
        "template": template_of_raw(options, tokenizer),
        "sources": [(Path(entry["file"]).name, entry["sha256"]) for entry in sources],
    }
    return fingerprint(identity)[:16]
