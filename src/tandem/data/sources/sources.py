"""What preprocessing reads: files, and for each group of them the handler that says what its records mean."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tandem.data.handlers.registry import LLAMA_FACTORY, Handler, detect_handler, make_handler
from tandem.data.sources.readers import Block, expand_input, iter_blocks, parse_row
from tandem.errors import UserError, nearest

_DATASET_INFO = "dataset_info.json"
# Of an entry: formatting -> handler, and the names that its `columns` may give.
_FORMATS = {
    "alpaca": ("AlpacaStyleInstructionHandler", ("prompt", "query", "response", "history", "system")),
    "sharegpt": ("SharegptStyleInstructionHandler", ("messages", "system", "tools")),
    "openai": ("OpenAIInstructionHandler", ("messages", "system", "tools")),
}
_REQUIRED_COLUMNS = ("prompt", "response", "messages")


@dataclass(frozen=True)
class Source:
    """Files whose records mean the same; `handler_name` is the handler's, as upstream calls it, and `map_keys` what it
    was made with."""

    files: tuple[Path, ...]
    handler_name: str
    handler: Handler
    map_keys: Mapping[str, Any] | None = None


def open_sources(
    inputs: Sequence[str],
    handler_name: str,
    json_keys: Sequence[str],
    map_keys: Mapping[str, Any] | None,
    dataset_dir: str | None,
    skip_bad: bool,
) -> list[Source]:
    """One source of all inputs, or with `LlamaFactoryInstructionHandler` one per dataset that they name.

    Args:
        handler_name: "" looks at the first readable record, and past unreadable ones if `skip_bad`.

    Raises:
        UserError: files are missing, or no handler fits.
    """
    if handler_name == LLAMA_FACTORY:
        assert dataset_dir is not None
        return _llama_factory_sources(dataset_dir, [name for words in inputs for name in words.split(",")])
    files = tuple(expand_input(inputs))
    name = handler_name
    if not name:
        name, map_keys = _detect(files, json_keys, map_keys, skip_bad)
    return [Source(files, name, make_handler(name, json_keys, map_keys), map_keys)]


def iter_source_blocks(sources: Sequence[Source], max_samples: int | None = None) -> Iterator[Block]:
    """All rows of all sources, in order; of each source at most the first `max_samples`."""
    for number, source in enumerate(sources):
        left = max_samples
        for block in iter_blocks(source.files):
            count = block.count if left is None else min(block.count, left)
            yield dataclasses.replace(block, count=count, source=number)
            left = None if left is None else left - count
            if left == 0:
                break


def _detect(
    files: Sequence[Path], json_keys: Sequence[str], map_keys: Mapping[str, Any] | None, skip_bad: bool
) -> tuple[str, Mapping[str, Any] | None]:
    """As `detect_handler` of the first readable row; unreadable ones are reported when their turn comes."""
    for block in iter_blocks(files):
        for index, row in enumerate(block.rows()):
            readable = False
            try:
                record = parse_row(row)
                readable = True
                return detect_handler(record, json_keys, map_keys)
            except UserError as error:
                if readable or not skip_bad:
                    raise UserError(f"{block.place(index)}: {error}") from None
    raise UserError(f"{', '.join(map(str, files))}: no readable record")


def _llama_factory_sources(dataset_dir: str, names: Sequence[str]) -> list[Source]:
    """The datasets of LLaMA-Factory's `dataset_info.json`, by name (a path before the name is ignored, as upstream
    does)."""
    path = Path(dataset_dir) / _DATASET_INFO
    try:
        datasets = orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; dataset_dir is the folder with that file and the data") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(datasets, dict) or not all(isinstance(entry, dict) for entry in datasets.values()):
        raise UserError(f"{path}: expected an object with an object per dataset")
    sources = [_llama_factory_source(path, datasets, os.path.basename(name.strip())) for name in names if name.strip()]
    if not sources:
        raise UserError(f"{path}: input names no dataset; it has {sorted(datasets)}")
    return sources


def _llama_factory_source(path: Path, datasets: Mapping[str, dict[str, Any]], name: str) -> Source:
    if name not in datasets:
        raise UserError(f"{path}: no dataset {name!r}; it has {sorted(datasets)}{nearest(name, sorted(datasets))}")
    entry, place = datasets[name], f"{path}, dataset {name!r}"
    if not isinstance(entry.get("file_name"), str):
        raise UserError(f"{place}: file_name is missing; only local files are read, found {sorted(entry)}")
    if entry.get("ranking"):
        raise UserError(
            f"{place}: ranking data are pairs; preprocess them with --handler-name AlpacaStylePairwiseHandler or "
            f"SharegptStylePairwiseHandler"
        )
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _FORMATS:
        raise UserError(f"{place}: formatting is {formatting!r}, expected one of {sorted(_FORMATS)}")
    handler_name, known = _FORMATS[formatting]
    map_keys = _map_keys(place, entry, known)
    try:
        handler = make_handler(handler_name, map_keys=map_keys)
        return Source(tuple(expand_input([path.parent / entry["file_name"]])), handler_name, handler)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _map_keys(place: str, entry: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Where `columns` are named, those left out are not read, but for what every record has."""
    columns, tags = entry.get("columns"), entry.get("tags")
    for what, value in (("columns", columns), ("tags", tags)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{place}: {what}: expected an object of names")
    unknown = sorted(set(columns or {}) - set(known))
    if unknown:
        raise UserError(f"{place}: columns {unknown} are not read; this formatting has {list(known)}")
    map_keys: dict[str, Any] = {}
    if columns is not None:
        map_keys = {name: columns.get(name) or "" for name in known if name in columns or name not in _REQUIRED_COLUMNS}
    return map_keys if tags is None else {**map_keys, "tags": tags}
