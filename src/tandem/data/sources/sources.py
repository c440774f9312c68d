"""The input of preprocessing: groups of files, each with the handler that reads its records."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.handlers.fields import described
from tandem.data.handlers.preferences import KTO_TAG
from tandem.data.handlers.registry import LLAMA_FACTORY, Handler, detect_handler, make_handler
from tandem.data.sources.files import expand_input
from tandem.data.sources.readers import Block, iter_blocks, parse_row
from tandem.errors import UserError, nearest
from tandem.files.text import read_json

DATASET_INFO = "dataset_info.json"
# formatting of an entry -> how the names of its handlers begin, and the names that its `columns` may have
_FORMATS = {
    "alpaca": ("AlpacaStyle", ("prompt", "query", "history", "system", "tools")),
    "sharegpt": ("SharegptStyle", ("messages", "system", "tools")),
    "openai": ("OpenAI", ("messages", "system", "tools")),
}
_PAIR: tuple[str, ...] = ("chosen", "rejected")  # more names of those with `ranking`
_ANSWER: dict[str, tuple[str, ...]] = {"alpaca": ("response",)}  # and of the others
_REQUIRED_COLUMNS = ("prompt", "response", "messages", "chosen", "rejected")
_KEYS = ("file_name", "formatting", "columns", "tags", "ranking", "num_samples", "file_sha1")  # of an entry
_ELSEWHERE = (
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "cloud_file_name",
    "script_url",
)  # data that are not on this disk


@dataclass(frozen=True)
class Source:
    """Files that one handler reads.

    Attributes:
        handler_name: upstream's name of the handler.
        map_keys: what the handler was made with.
        max_samples: so many rows are read at most; None: all.
    """

    files: tuple[Path, ...]
    handler_name: str
    handler: Handler
    map_keys: Mapping[str, Any] | None = None
    max_samples: int | None = None


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
        handler_name: "" chooses the handler by the first record; with `skip_bad`, by the first readable record.

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
    """All rows of all sources, in order; at most the first `max_samples` of each source."""
    for number, source in enumerate(sources):
        left = min((limit for limit in (max_samples, source.max_samples) if limit is not None), default=None)
        for block in iter_blocks(source.files):
            count = block.count if left is None else min(block.count, left)
            yield dataclasses.replace(block, count=count, source=number)
            left = None if left is None else left - count
            if left == 0:
                break


def _detect(
    files: Sequence[Path], json_keys: Sequence[str], map_keys: Mapping[str, Any] | None, skip_bad: bool
) -> tuple[str, Mapping[str, Any] | None]:
    """`detect_handler` of the first readable row. With `skip_bad`, unreadable rows are reported later, not here."""
    for block in iter_blocks(files):
        for index, row in enumerate(block.rows()):
            is_readable = False
            try:
                record = parse_row(row, block.file)
                is_readable = True
                return detect_handler(record, json_keys, map_keys)
            except UserError as error:
                if is_readable or not skip_bad:
                    raise UserError(f"{block.place(index)}: {error}") from None
    raise UserError(f"{', '.join(map(str, files))}: no readable record")


def _llama_factory_sources(dataset_dir: str, names: Sequence[str]) -> list[Source]:
    """The datasets of LLaMA-Factory's `dataset_info.json`, by name (a path before the name is ignored, as upstream
    does)."""
    path = Path(dataset_dir) / DATASET_INFO
    if not path.is_file():
        raise UserError(f"{path}: No such file; --dataset-dir is the folder with that file and the data")
    datasets = read_json(path)
    if not isinstance(datasets, dict) or not all(isinstance(entry, dict) for entry in datasets.values()):
        raise UserError(f"{path}: expected an object that holds one object per dataset")
    sources = [_llama_factory_source(path, datasets, os.path.basename(name.strip())) for name in names if name.strip()]
    if not sources:
        raise UserError(f"{path}: --input names no dataset; the file has {sorted(datasets)}")
    return sources


def _llama_factory_source(path: Path, datasets: Mapping[str, dict[str, Any]], name: str) -> Source:
    if name not in datasets:
        raise UserError(
            f"{path}: no dataset {name!r}; the file has {sorted(datasets)}{nearest(name, sorted(datasets))}"
        )
    entry, place = datasets[name], f"{path}, dataset {name!r}"
    _require_known_keys(entry, place)
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _FORMATS:
        raise UserError(f"{place}: formatting is {formatting!r}, expected one of {sorted(_FORMATS)}")
    beginning, column_names = _FORMATS[formatting]
    answer = _ANSWER.get(formatting, ())
    if entry.get("ranking"):
        form, names = "Pairwise", (*column_names, *_PAIR)
    elif isinstance(entry.get("columns"), dict) and KTO_TAG in entry["columns"]:
        form, names = "Unpaired", (*column_names, *answer, KTO_TAG)
    else:
        form, names = "Instruction", (*column_names, *answer)
    handler_name = f"{beginning}{form}Handler"
    map_keys = _map_keys(place, entry, names)
    if KTO_TAG in map_keys:
        map_keys["label"] = map_keys.pop(KTO_TAG)
    file = path.parent / entry["file_name"]
    try:
        source = Source(tuple(expand_input([file])), handler_name, make_handler(handler_name, map_keys=map_keys))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    _require_sha1(entry, place, source.files)
    return dataclasses.replace(source, max_samples=entry.get("num_samples"))


def _require_known_keys(entry: Mapping[str, Any], place: str) -> None:
    """Raise UserError for what an entry says and nobody would hear."""
    if not isinstance(entry.get("file_name"), str):
        raise UserError(f"{place}: file_name is missing, and only local files are read; the entry has {sorted(entry)}")
    for key in entry:
        if key in _ELSEWHERE:
            raise UserError(f"{place}: {key} names data that are not on this disk; leave it out to read file_name")
        if key not in _KEYS:
            raise UserError(f"{place}: {key!r} is not known here; expected {list(_KEYS)}{nearest(key, list(_KEYS))}")
    count = entry.get("num_samples")
    if count is not None and (type(count) is not int or count < 1):
        raise UserError(f"{place}: num_samples is {count!r}, expected a whole number of 1 or more")


def _require_sha1(entry: Mapping[str, Any], place: str, files: Sequence[Path]) -> None:
    """Raise UserError when the data are not those that `file_sha1` is of."""
    expected = entry.get("file_sha1")
    if expected is None:
        return
    if len(files) != 1:
        raise UserError(f"{place}: file_sha1 is of one file, but file_name gives {len(files)}; leave file_sha1 out")
    digest = hashlib.sha1(usedforsecurity=False)
    with files[0].open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected:
        raise UserError(
            f"{place}: file_sha1 is {expected!r}, but that of {files[0]} is {found!r}: the file was changed or is "
            f"damaged; get it again, or leave file_sha1 out"
        )


def _map_keys(place: str, entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The `map_keys` of an entry. Columns that `columns` leaves out are not read, except for the required ones."""
    columns, tags = entry.get("columns"), entry.get("tags")
    for key, value in (("columns", columns), ("tags", tags)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{place}: {key}: expected an object of names, found {described(value)}")
    unknown = sorted(set(columns or {}) - set(names))
    if unknown:
        raise UserError(f"{place}: columns {unknown} are not read; expected names of {list(names)}")
    map_keys: dict[str, Any] = {}
    if columns is not None:
        map_keys = {name: columns.get(name) or "" for name in names if name in columns or name not in _REQUIRED_COLUMNS}
    return map_keys if tags is None else {**map_keys, "tags": tags}
