"""The tokens that end a text, as the files of a model state them: one rule for every command.

They stand in three files: `eos_token_id` of `generation_config.json` and of `config.json`, a number or a list, and
`eos_token` of `tokenizer_config.json`. Files of one model often name different ones. A model may end its answer with
any of them, so all count. Where one is needed, it is the tokenizer's, then the first of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.files.text import read_json

GENERATION_CONFIG = "generation_config.json"
FILES = (GENERATION_CONFIG, "config.json")  # the first is what transformers takes where both exist
FIELD = "eos_token_id"


def end_ids(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The end tokens of a `config.json` or `generation_config.json`; none where it names none.

    >>> end_ids({"eos_token_id": [7, 3]}, "generation_config.json")
    (7, 3)

    Raises:
        UserError: the field holds something else than token ids. `where` is named.
    """
    value = config.get(FIELD)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise UserError(f"{where}: {FIELD} is {value!r}; expected a token id, or a list of them")
    return tuple(dict.fromkeys(ids))


def end_ids_in(folder: Path) -> tuple[int, ...]:
    """The end tokens that the files of a folder state, without the tokenizer's own, each once.

    Raises:
        UserError: a file is malformed.
    """
    ids: list[int] = []
    for path in (folder / name for name in FILES):
        if path.is_file():
            config = read_json(path)
            ids += end_ids(config if isinstance(config, dict) else {}, str(path))
    return tuple(dict.fromkeys(ids))
