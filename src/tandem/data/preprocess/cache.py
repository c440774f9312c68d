"""Raw files where preprocessed ones are wanted: preprocessed once into a cache, found there ever after."""

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
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.preprocess.spool import BusyError, fingerprint
from tandem.data.record import read_record, record_path, source_entries, template_entry, tokenizer_entry
from tandem.data.sources.readers import expand_input
from tandem.data.templates.catalog import get_template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.logs import log

_REVISION = 2  # one more whenever preprocessing makes other files of the same input
_WITHOUT_TRACE = ("input", "output_prefix", "tokenizer_name_or_path", "workers", "log_interval")
_SECONDS_BETWEEN_LOOKS = 0.5
_IN_CACHE = re.compile(r"(\.preprocessed/)[0-9a-f]{16}(?=/)")
Wait = Callable[[Path], None]


def is_raw(data_path: str) -> bool:
    """Whether a data path names files to be preprocessed, and not the prefix of files that were."""
    if data_path.endswith((".bin", ".idx")) or read_record(data_path) is not None or kind_of(data_path) is not None:
        return False
    return os.path.exists(data_path) or bool(glob.glob(data_path, recursive=True))


def without_keys(paths: Sequence[str]) -> list[str]:
    """Paths as `preprocess_once` returns them, but for the keys: the same for whatever became of the same files."""
    return [_IN_CACHE.sub(r"\1", path) for path in paths]


def wait_for(record: Path) -> None:
    """Return when another process has written `record`. It comes last and its name says what is in it, so looking for
    it is enough; nothing times out while a slow preprocessing goes on."""
    while not _is_whole(record):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def preprocess_once(options: PreprocessOptions, cache: str | None, leader: bool = True, wait: Wait = wait_for) -> str:
    """Preprocess one raw data path, unless that was done before, into `{cache}/{name}.preprocessed/{key}`.

    The key is a hash of the bytes of all files, of the tokenizer, of the template, of the options and of what we make
    of them, so that whatever differs lies elsewhere, and what is the same is found also on another machine.

    Args:
        options: `input` is the raw data path; `output_prefix` is not used.
        cache: folder; None is that of the raw files, or the nearest above them that a pattern names in full.
        leader: whether this process does the work; each machine (or shared disk) needs one. The others wait.
        wait: called with the record that the leader writes; returns when it is there.

    Returns:
        What `--data-path` takes.

    Raises:
        UserError: as `preprocess`, or the cache cannot be written.
    """
    (raw,) = options.input
    path = Path(os.path.abspath(raw))
    name = re.sub(r"[*?[\]]", "_", path.name)
    beside = next(parent for parent in path.parents if not glob.has_magic(str(parent)) or parent.exists())
    folder = Path(cache or beside) / f"{name}.preprocessed" / _key(options)
    options = replace(options, output_prefix=str(folder / "data"))
    record = record_path(options.output_prefix)
    if leader and not _is_whole(record):
        log.info("> preprocessing %s into %s", raw, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; give a folder of yours with --data-cache-path") from None
        try:
            preprocess(options)
        except BusyError:  # another job does it
            wait(record)
    elif not leader:
        wait(record)
    found = read_record(options.output_prefix)
    if found is None:
        raise UserError(f"{record}: the process that preprocesses {raw} did not write it; see its messages")
    if kind_of(options.output_prefix):
        return options.output_prefix
    return str(folder / next(iter(found[1]["files"].values())))  # of text, the pair is the data path


def _is_whole(record: Path) -> bool:
    """Whether a record is there, and the files that it names: someone may have removed some."""
    found = read_record(str(record).removesuffix(".json"))
    return found is not None and all(
        (record.parent / f"{name}.{suffix}").is_file()
        for name in found[1]["files"].values()
        for suffix in ("bin", "idx")
    )


def template_of_raw(options: PreprocessOptions, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The template that the record of the preprocessed data will name."""
    if options.prompt_type is None:
        return None
    return template_entry(get_template(options.prompt_type, options.thinking_mode, tokenizer))


def _key(options: PreprocessOptions) -> str:
    with source_entries(expand_input(options.input)) as entries:
        sources = entries()
    tokenizer = Tokenizer(options.tokenizer_name_or_path)
    identity = {
        "revision": _REVISION,
        "options": {name: value for name, value in options.recorded().items() if name not in _WITHOUT_TRACE},
        "tokenizer": tokenizer_entry(tokenizer),
        "template": template_of_raw(options, tokenizer),
        "sources": [(Path(entry["file"]).name, entry["sha256"]) for entry in sources],
    }
    return fingerprint(identity)[:16]
