"""Raw files in `--data-path` and `--valid-data-path`: what training needs is made of them first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tandem.config.settings import DataSettings
from tandem.data.kinds import CONVERSATIONS, TEXT, Kind
from tandem.data.preprocess.cache import Wait, is_raw, preprocess_once, template_of_raw, wait_for
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import kind_of_input, try_first_rows
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.options import parse_json_object
from tandem.training.start.data_checks import check_files
from tandem.training.start.data_paths import all_prefixes, split_name
from tandem.training.start.datasets import kind_to_train

# How the same files may be read as data of another kind.
_OTHER_READINGS = {
    TEXT: "; --handler-name and --map-keys say how records are conversations",
    CONVERSATIONS: "; with --handler-name AlpacaPretrainHandler or SharegptPretrainHandler they are plain text",
}


def with_preprocessed(
    data: DataSettings, tokenizer: Tokenizer | None, leader: bool = True, wait: Wait = wait_for
) -> DataSettings:
    """Raw files as the prefixes of what they become, preprocessed now unless they were before.

    Args:
        leader: whether this process may do it; the first of each machine, while the others `wait` for its record.

    Raises:
        UserError: as preprocessing.
    """
    options = raw_options(data, tokenizer)
    if not options:
        return data

    def ready(path: str) -> str:
        return preprocess_once(options[path], data.data_cache_path, leader, wait) if path in options else path

    paths = tuple(map(ready, data.data_path))
    valid = tuple(
        ready(path) if name is None else f"{name}={ready(path)}" for name, path in map(split_name, data.valid_data_path)
    )
    return dataclasses.replace(data, data_path=paths, valid_data_path=valid)


def check_ready(data: DataSettings) -> None:
    """Raise UserError when data that are not raw are not there either."""
    for prefix in all_prefixes(data):
        if not is_raw(prefix):
            check_files(prefix, kind_to_train(data))


def describe_raw(raw: Mapping[str, PreprocessOptions]) -> list[str]:
    """What becomes of the first rows of each raw path; nothing is written.

    Raises:
        UserError: as preprocessing.
    """
    lines = []
    for path, options in raw.items():
        counts = try_first_rows(options)
        lines.append(
            f"{path} is raw and is preprocessed before training; of its first {counts['documents']:,} documents "
            f"{counts['kept']:,} are kept, {counts['tokens']:,} tokens"
        )
    return lines


def raw_templates(raw: Mapping[str, PreprocessOptions]) -> dict[str, dict[str, Any] | None]:
    """The template of which each raw path is made, as its record will name it."""
    return {path: template_of_raw(options, Tokenizer(options.tokenizer_name_or_path)) for path, options in raw.items()}


def raw_options(data: DataSettings, tokenizer: Tokenizer | None) -> dict[str, PreprocessOptions]:
    """How each raw path is to be preprocessed; where to is not said.

    Raises:
        UserError: settings do not say how.
    """
    raw = [path for path in all_prefixes(data) if is_raw(path)]
    if not raw:
        return {}
    if len(data.json_keys) != 1:
        raise UserError(f"--json-keys {' '.join(data.json_keys)}: training on raw files reads one field")
    if tokenizer is None:
        raise UserError("raw files as training data need --tokenizer-name-or-path, the folder of the tokenizer")
    options = PreprocessOptions(
        input=(raw[0],),
        output_prefix="",
        tokenizer_name_or_path=str(tokenizer.folder),
        handler_name=data.handler_name,
        json_keys=data.json_keys,
        map_keys=parse_json_object("--map-keys", data.map_keys),
        prompt_type=data.prompt_type,
        enable_thinking=data.enable_thinking or "none",
        append_eod=data.append_eod,
        workers=data.workers,
    )
    by_path = {path: dataclasses.replace(options, input=(path,)) for path in raw}
    for path, its_options in by_path.items():
        _require_kind(path, kind_of_input(its_options), kind_to_train(data))
    return by_path


def _require_kind(path: str, kind: Kind, wanted: Kind) -> None:
    """Raise UserError where a run cannot train on what the first record of a raw file is."""
    if kind is not wanted:
        raise UserError(f"{path}: by the first record these are {kind.in_words}{_OTHER_READINGS.get(kind, '')}")
