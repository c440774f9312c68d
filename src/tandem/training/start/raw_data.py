"""Raw files in `--data-path` and `--valid-data-path`: they are preprocessed before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tandem.config.settings import DataSettings
from tandem.data.kinds import CONVERSATIONS, TEXT, UNPAIRED, Kind
from tandem.data.preprocess.cache import (
    Wait,
    check_cache,
    folder_in_cache,
    is_in_cache,
    is_raw,
    prefix_in_cache,
    preprocess_once,
    template_of_raw,
    wait_for,
)
from tandem.data.preprocess.noticed import told
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import kind_of_input, readers_of, try_first_rows
from tandem.data.templates.messages import CHAT_TEMPLATE
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.options import flag_of, parse_json_object
from tandem.training.logs.log import log_notice
from tandem.training.start.data_checks import check_files
from tandem.training.start.data_paths import all_prefixes, split_name
from tandem.training.start.datasets import kind_to_train

# How to read the same files as data of another kind.
_OTHER_READINGS = {
    TEXT: "; to read them as conversations, give --handler-name or --map-keys",
    CONVERSATIONS: "; to read them as text, give --handler-name AlpacaPretrainHandler or SharegptPretrainHandler",
    UNPAIRED: "; to train on all answers alike, give the --handler-name of such conversations",
}
# Settings that only say how raw files are preprocessed.
_FOR_RAW_FILES = (
    *("handler_name", "json_keys", "map_keys", "append_eod", "eod_token", "special_tokens_in_text"),
    *("train_turns", "over_long", "on_bad"),
)


def with_preprocessed(
    data: DataSettings, tokenizer: Tokenizer | None, leader: bool = True, wait: Wait = wait_for
) -> DataSettings:
    """Preprocess raw files, unless they are in the cache, and replace them by the prefixes of the result.

    Args:
        leader: whether this process preprocesses. The first process of a machine does; the others `wait` for its
            record.

    Raises:
        UserError: as in preprocessing.
    """
    options = raw_options(data, tokenizer)
    if not options:
        if flags := [flag_of(name) for name in _FOR_RAW_FILES if getattr(data, name) != getattr(DataSettings, name)]:
            log_notice(f"{' '.join(flags)}: for raw files; the data are preprocessed already, and stay as they are")
        return data

    def ready(path: str) -> str:
        return preprocess_once(options[path], data.data_cache_path, leader, wait) if path in options else path

    return _replaced(data, ready)


def as_in_cache(
    data: DataSettings, raw: Mapping[str, PreprocessOptions]
) -> tuple[DataSettings, dict[str, PreprocessOptions], dict[str, PreprocessOptions]]:
    """Replace raw files by the prefixes that they get or have got. Nothing is preprocessed; all files are hashed.

    Returns:
        The settings, and options by prefix: of raw files that are preprocessed already, and of the others.
    """
    prefixes = {path: prefix_in_cache(options, data.data_cache_path) for path, options in raw.items()}
    paths = {path: kind_to_train(data).data_paths(prefix, data.json_keys)[0] for path, prefix in prefixes.items()}
    is_ready = {path: is_in_cache(prefix) for path, prefix in prefixes.items()}
    ready, missing = ({paths[path]: raw[path] for path in raw if is_ready[path] is there} for there in (True, False))
    return _replaced(data, lambda path: paths.get(path, path)), ready, missing


def was_preprocessed(raw: Mapping[str, PreprocessOptions], cache: str | None) -> bool:
    """Whether a raw path was preprocessed before, perhaps with other files or flags."""
    return any(folder_in_cache(path, cache).is_dir() for path in raw)


def _replaced(data: DataSettings, ready: Callable[[str], str]) -> DataSettings:
    """The settings with what `ready` gives for each path."""
    paths = tuple(map(ready, data.data_path))
    valid = tuple(
        ready(path) if name is None else f"{name}={ready(path)}" for name, path in map(split_name, data.valid_data_path)
    )
    return dataclasses.replace(data, data_path=paths, valid_data_path=valid)


def check_ready(data: DataSettings) -> None:
    """Raise UserError when preprocessed data are missing."""
    for prefix in all_prefixes(data):
        if not is_raw(prefix):
            check_files(prefix, kind_to_train(data))


def describe_raw(raw: Iterable[PreprocessOptions], cache: str | None) -> list[str]:
    """Try to preprocess the first rows of raw paths, and describe the result. Nothing is written.

    Raises:
        UserError: as in preprocessing; or the cache cannot be written.
    """
    lines = []
    for options in raw:
        (path,) = options.input
        check_cache(path, cache)
        chunk, source = try_first_rows(options)
        counts = chunk.counts
        lines.append(
            f"{path} is raw and is preprocessed before training; of the first {counts['documents']:,} documents "
            f"{counts['kept']:,} are kept, {counts['tokens']:,} tokens, read with {source.handler_name}"
            f"{_as_written(options)}"
        )
        readers = readers_of(chunk.unread, chunk.held, [source], options)
        lines += [f"{path}: {line}" for line in told(chunk.unread, readers, chunk.noticed)]
    return lines


def describe_ready(prefix: str, options: PreprocessOptions) -> str:
    """A line about raw files that were preprocessed before."""
    return f"{options.input[0]} is raw and was preprocessed before, into {prefix}{_as_written(options)}"


def _as_written(options: PreprocessOptions) -> str:
    return f", written with --prompt-type {options.prompt_type}" if options.prompt_type else ""


def raw_templates(raw: Mapping[str, PreprocessOptions]) -> dict[str, dict[str, Any] | None]:
    """The template of each raw path, as its record will name it."""
    return {path: template_of_raw(options, Tokenizer(options.tokenizer_name_or_path)) for path, options in raw.items()}


def raw_options(data: DataSettings, tokenizer: Tokenizer | None) -> dict[str, PreprocessOptions]:
    """The options to preprocess each raw path with, without an output prefix.

    Raises:
        UserError: there is no tokenizer, or the files are of a kind that the run cannot train on.
    """
    raw = [path for path in all_prefixes(data) if is_raw(path)]
    if not raw:
        return {}
    if len(data.json_keys) != 1:
        raise UserError(f"--json-keys {' '.join(data.json_keys)}: expected one field for training on raw files")
    if tokenizer is None:
        raise UserError("training on raw files needs --tokenizer-name-or-path, the folder of the tokenizer")
    options = PreprocessOptions(
        input=(raw[0],),
        output_prefix="",
        tokenizer_name_or_path=str(tokenizer.folder),
        handler_name=data.handler_name,
        json_keys=data.json_keys,
        map_keys=parse_json_object("--map-keys", data.map_keys),
        enable_thinking=data.enable_thinking or "none",
        append_eod=data.append_eod,
        eod_token=data.eod_token,
        special_tokens_in_text=data.special_tokens_in_text,
        on_bad=data.on_bad,
        workers=data.workers,
    )
    if kind_to_train(data).has_labels:
        options = dataclasses.replace(
            options,
            prompt_type=data.prompt_type or (CHAT_TEMPLATE if tokenizer.chat_template else None),
            train_turns=data.train_turns,
            over_long=data.over_long,
            # Training itself cuts what is too long; only to leave it out, or to stop, its length matters here.
            seq_length=None if data.over_long == "trim" else data.seq_length + 1,
        )
    by_path = {path: dataclasses.replace(options, input=(path,)) for path in raw}
    for path, path_options in by_path.items():
        _require_kind(path, kind_of_input(path_options), kind_to_train(data))
    return by_path


def _require_kind(path: str, kind: Kind, expected: Kind) -> None:
    """Raise UserError when the first record of a raw file is of another kind than the run trains on."""
    if kind is not expected:
        raise UserError(f"{path}: by the first record these are {kind.in_words}{_OTHER_READINGS.get(kind, '')}")
