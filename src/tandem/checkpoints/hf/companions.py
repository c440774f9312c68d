"""The small files next to a model's weights: config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tandem.checkpoints.folders import COMPANIONS, TRACKER
from tandem.checkpoints.hf.record import CERTIFICATE, RECORD
from tandem.checkpoints.hf.weights import INDEX, TORCH_INDEX
from tandem.checkpoints.interface import TEMPLATE_FOLDER, Companions
from tandem.checkpoints.recognise import unusable
from tandem.errors import UserError
from tandem.files.real import check_real
from tandem.files.text import read_json
from tandem.models.config import ModelConfig
from tandem.models.end_tokens import GENERATION_CONFIG, end_ids
from tandem.models.hf_config import hf_dtype, load_hf_config, to_hf

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *(CHAT_TEMPLATE, "chat_template.json"),
)
MODEL_FILES = (GENERATION_CONFIG, RECORD)
SUSPECTED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")  # files of these names may be meant to belong to a model
SMALL = 1_000_000  # bytes of JSON that are parsed at once


def companion_files(folder: str | Path) -> list[Path]:
    """The small files of a Hugging Face folder, except its config: tokenizer, template, generation settings.

    Raises:
        UserError: one of them is a dangling link, a Git-LFS pointer, or JSON that is cut short.
    """
    files = [Path(folder) / name for name in (*TOKENIZER_FILES, *MODEL_FILES)]
    files += (Path(folder) / TEMPLATE_FOLDER).glob("*.jinja")
    for path in files:
        check_real(path)
    found = sorted(path for path in files if path.is_file())
    for path in found:
        if path.suffix == ".json":
            _check_json(path)
    return found


def companions_of(folder: str | Path) -> Companions:
    """The config and the companion files of a Hugging Face folder. Raises as `companion_files`."""
    folder = Path(folder)
    if not (folder / CONFIG).exists() and not (folder / TRACKER).exists():
        raise unusable(folder)
    return Companions(load_hf_config(folder), companion_files(folder), left_out=_others(folder))


def with_tokenizer(companions: Companions, folder: str | Path | None) -> Companions:
    """The companions with the tokenizer of another folder; None keeps theirs.

    The tokenizer's files are all from there. Files of two tokenizers together would make a third one.
    """
    if folder is None:
        return companions
    given = companion_files(folder)
    names = {*TOKENIZER_FILES, *(path.name for path in given)}
    kept = [path for path in companions.files if path.name not in names and path.parent.name != TEMPLATE_FOLDER]
    return Companions(companions.hf_config, sorted([*kept, *given], key=lambda path: path.name))


def companions_in(iteration: Path) -> Companions:
    """Those that were stored with an iteration of a checkpoint; none where a trainer of others wrote it."""
    return companions_of(iteration / COMPANIONS) if (iteration / COMPANIONS).is_dir() else Companions()


def original_dtype(companions: Companions, written: str) -> str:
    """The dtype of the model that the companions come from; `written` when its config does not say."""
    return hf_dtype(companions.hf_config or {}) or written


def end_ids_of(companions: Companions) -> tuple[int, ...]:
    """The end tokens that the companions name, without the tokenizer's own, each once.

    Raises:
        UserError: a file is malformed.
    """
    generation = companion_json(companions, GENERATION_CONFIG)
    ids = (*end_ids(generation, GENERATION_CONFIG), *end_ids(companions.hf_config or {}, "config.json"))
    return tuple(dict.fromkeys(ids))


def companion_json(companions: Companions, name: str) -> dict[str, Any]:
    """The content of a companion file, with the changes made so far; empty when there is no such file."""
    text = companions.text_of(name)
    return {} if text is None else dict(json.loads(text))


def chat_template_of(companions: Companions) -> str | None:
    """The chat template that `transformers` takes; None without one."""
    return companions.text_of(CHAT_TEMPLATE) or companion_json(companions, TOKENIZER_CONFIG).get("chat_template")


def write_companions(folder: Path, companions: Companions, config: ModelConfig, dtype: str) -> None:
    """Write `config.json` and copy the tokenizer files into `folder`.

    Args:
        dtype: what the config says. Next to a checkpoint that is the original model's, of which export reminds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hf = to_hf(config, companions.hf_config, dtype)
    (folder / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    write_files(folder, companions)


def write_files(folder: Path, companions: Companions, leave_out: Collection[str] = ()) -> None:
    """Write the files next to `config.json` into `folder`, which exists, but those that `leave_out` names."""
    for name, path in companions.places.items():
        if name not in leave_out:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    tokenizer = companion_json(companions, TOKENIZER_CONFIG)
    older = for_transformers_4(tokenizer)
    changed = {TOKENIZER_CONFIG: json.dumps(older, indent=2, ensure_ascii=False) + "\n"} if older != tokenizer else {}
    for name, text in {**companions.texts, **changed}.items():
        if name not in leave_out:
            (folder / name).write_text(text, encoding="utf-8")


def for_transformers_4(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config under the names of transformers 4, where 5 writes others. Both read the older ones.

    >>> for_transformers_4({"tokenizer_class": "TokenizersBackend"})
    {'model_input_names': ['input_ids', 'attention_mask'], 'tokenizer_class': 'PreTrainedTokenizerFast'}
    """
    older = dict(tokenizer_config)
    if older.get("tokenizer_class") == "TokenizersBackend":
        # Without the names, 4 gives token_type_ids, too, which `generate()` of these models refuses.
        older = {"model_input_names": ["input_ids", "attention_mask"], **older}
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(older.get("extra_special_tokens"), list) and "additional_special_tokens" not in older:
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older


def _check_json(path: Path) -> None:
    """Raise UserError when a file is no JSON object. Of a large file only both ends are looked at."""
    with open(path, "rb") as file:
        content = file.read(SMALL)
        if file.read(1):
            file.seek(-SMALL, 2)
            ends = content.lstrip()[:1], file.read().rstrip()[-1:]
            if ends != (b"{", b"}"):
                raise UserError(f"{path}: cut short, or not a JSON object; copy or download it again")
            return
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object")


def _others(folder: Path) -> tuple[str, ...]:
    """Names of files that might be taken for parts of a model, and are not copied."""
    known = {*TOKENIZER_FILES, *MODEL_FILES, CONFIG, INDEX, TORCH_INDEX, CERTIFICATE}
    files = {path.name for pattern in SUSPECTED for path in folder.glob(pattern)}
    return tuple(sorted(files - known))
