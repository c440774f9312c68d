"""The tokenizer of a Hugging Face folder, over the `tokenizers` library."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tandem.data.tokens.chat_template import render_chat_template
from tandem.errors import UserError
from tandem.files.real import check_folder, check_real
from tandem.files.text import read_json, read_text
from tandem.models.end_tokens import end_ids_in

CHAT_TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # where transformers 5 writes the others, each under its name
DEFAULT, TOOL_USE = "default", "tool_use"  # the names that transformers knows
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


class Tokenizer:
    """The tokenizer of a folder: `tokenizer.json`, the special tokens of `tokenizer_config.json`, the chat template.

    The ids are the same as those of `transformers.AutoTokenizer` with this folder.

    Attributes:
        end_ids: ids of all tokens that end a text, by the rule of `tandem.models.end_tokens`.
        eos_id: the first of them, which ends documents; None without one.
        pad_id, bos_id: ids of other special tokens; None when the folder does not name them.
        sha256: hash of `tokenizer.json`; data and checkpoints record it.
        chat_template: Jinja source, or None.
        tool_template: that of conversations with tools, where the folder has another one for them; or None.
        named_templates: names of all templates, where the folder names them.

    Raises:
        UserError: a file is missing or malformed, or a special token is not in the vocabulary.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        check_folder(self.folder, "a Hugging Face folder with a tokenizer")
        path = self.folder / "tokenizer.json"
        check_real(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; {_step_without_tokenizer(self.folder)}")
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            read_text(path)  # names another encoding
            raise UserError(f"{path}: not a tokenizer that the tokenizers library can read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_config(self.folder)
        self._add_missing_tokens(config.get("added_tokens_decoder") or {})
        own_end = self._special_id(config, "eos_token")
        self.end_ids = tuple(dict.fromkeys((*(() if own_end is None else (own_end,)), *end_ids_in(self.folder))))
        self.eos_id = next(iter(self.end_ids), None)
        self.pad_id = self._special_id(config, "pad_token")
        self.bos_id = self._special_id(config, "bos_token")
        templates = _read_templates(self.folder, config)
        self.chat_template, self.tool_template = templates.get(DEFAULT), templates.get(TOOL_USE)
        self.named_templates = tuple(sorted(templates)) if set(templates) != {DEFAULT} else ()
        self._special_tokens = {name: _token_text(config[name]) for name in SPECIAL_TOKENS if config.get(name)}

    def __len__(self) -> int:
        """Size of the vocabulary with added tokens (151,669 for Qwen3, whose embedding has more rows)."""
        return self._length

    @cached_property
    def _length(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def rows_needed(self) -> int:
        """Rows that an embedding needs for every token: the highest id, plus 1."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def check_fits(self, vocab_size: int, model: str) -> None:
        """Raise UserError when `model`, whose embedding has `vocab_size` rows, has none for some token."""
        if self.rows_needed > vocab_size:
            raise UserError(
                f"{self.folder}: the tokenizer has tokens up to id {self.rows_needed - 1:,}, and {model} has "
                f"{vocab_size:,} rows in its embedding. Give the model's own tokenizer with --tokenizer-name-or-path, "
                f"or add rows with `tandem convert --resize-vocab {self.rows_needed}`"
            )

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of one text. A special token that is written in the text becomes its id."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of many texts. Uses as many cores as TOKENIZERS_PARALLELISM allows."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_spelled(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of many texts, in which a special token is encoded as the letters that it is written with."""
        encodings = self._spelling.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _spelling(self) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model continues: with the special tokens that the tokenizer puts before a text.

        That is how texts begin in pretraining. An end token that it puts after a text would end the prompt, and is
        left out.
        """
        ids, plain = self.encode(text, add_special_tokens=True), self.encode(text)
        added = range(len(ids) - len(plain) + 1)  # how many may stand before the text
        before = next((number for number in added if plain and ids[number : number + len(plain)] == plain), None)
        return ids if before is None else ids[: before + len(plain)]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a `tokenizers.Tokenizer` forgets that it spells special tokens out, so it is made again.
        return {name: value for name, value in vars(self).items() if name != "_spelling"}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for. They may be a part of a character."""
        text = self.decode([token_id])
        if "\ufffd" not in text:
            return text.encode()
        spelled = self._tokenizer.id_to_token(token_id) or ""
        if re.fullmatch("<0x[0-9A-F]{2}>", spelled):  # as SentencePiece writes a byte
            return bytes([int(spelled[3:5], 16)])
        if all(character in _BYTE_OF for character in spelled):
            return bytes(_BYTE_OF[character] for character in spelled)
        return text.encode()

    @property
    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """By id, the tokens that are recognised anywhere in a text, special tokens included."""
        return self._tokenizer.get_added_tokens_decoder()

    @property
    def added_tokens_look_around(self) -> bool:
        """Whether some added token depends on more than its characters.

        It may match whole words only, take the space around it, or match normalised text.
        """
        normalizes = self._tokenizer.normalizer is not None
        return any(
            token.single_word or token.lstrip or token.rstrip or (token.normalized and normalizes)
            for token in self.added_tokens.values()
        )

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def require_id(self, token: str) -> int:
        """The id of a token that must exist.

        Raises:
            UserError: the vocabulary does not have it.
        """
        token_id = self.token_to_id(token)
        if token_id is None:
            raise UserError(f"{self.folder}: the vocabulary has no token {token!r}")
        return token_id

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text that the model's chat template writes, as transformers renders it.

        `variables`, such as `enable_thinking` and `tools`, are passed to the template.
        """
        template = (variables.get("tools") and self.tool_template) or self.chat_template
        if template is None:
            raise UserError(self.lack_of_template)
        return render_chat_template(
            template,
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            **{**self.chat_variables, **variables},
        )

    @property
    def lack_of_template(self) -> str:
        """That there is no template for conversations without tools, and which ones there are."""
        if not self.named_templates:
            return f"{self.folder}: has no chat template (chat_template.jinja or in tokenizer_config.json)"
        return (
            f"{self.folder}: none of its chat templates ({', '.join(self.named_templates)}) is named {DEFAULT}, which "
            f"conversations without tools need"
        )

    def without_templates(self) -> Tokenizer:
        """This tokenizer as one of a folder that has no chat templates."""
        changed = copy.copy(self)
        changed.chat_template, changed.tool_template, changed.named_templates = None, None, ()
        return changed

    def for_tools(self) -> Tokenizer:
        """This tokenizer with its template for tools as that of all conversations."""
        changed = copy.copy(self)
        changed.chat_template = self.tool_template or self.chat_template
        return changed

    @property
    def chat_variables(self) -> dict[str, Any]:
        """The variables that transformers passes to every chat template, in addition to the messages."""
        return {"tools": None, "documents": None, **self._special_tokens}

    def _add_missing_tokens(self, decoder: Mapping[str, Any]) -> None:
        """Add the tokens that older folders have only in `tokenizer_config.json`."""
        for token_id, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
            if self._tokenizer.token_to_id(entry["content"]) is None:
                fields = {
                    key: entry[key]
                    for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                    if key in entry
                }
                self._tokenizer.add_tokens([tokenizers.AddedToken(entry["content"], **fields)])
            actual_id = self._tokenizer.token_to_id(entry["content"])
            if actual_id != int(token_id):
                raise UserError(
                    f"{self.folder / 'tokenizer_config.json'}: token {entry['content']!r} has id {token_id} there, but "
                    f"{actual_id} in tokenizer.json; the files belong to different models"
                )

    def _special_id(self, config: Mapping[str, Any], name: str) -> int | None:
        value = config.get(name)
        if value is None:
            return None
        token_id = self._tokenizer.token_to_id(_token_text(value))
        if token_id is None:
            raise UserError(
                f"{self.folder / 'tokenizer_config.json'}: {name} {_token_text(value)!r} is not in tokenizer.json"
            )
        return int(token_id)


def _bytes_by_letter() -> dict[str, int]:
    """The letters with which byte-level tokenizers write bytes: most as Latin-1, the others in order from U+0100."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    as_latin = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = (byte for byte in range(256) if byte not in as_latin.values())
    return {**as_latin, **dict(zip((letter for letter in letters if ord(letter) > 255), others))}


_BYTE_OF = _bytes_by_letter()


def _step_without_tokenizer(folder: Path) -> str:
    """What helps when a folder has no tokenizer: a run has it in each iteration, and older models in another form."""
    if within := sorted([*folder.glob("*/tokenizer.json"), *folder.glob("*/*/tokenizer.json")]):
        return f"give {within[-1].parent}, which has one"
    if (folder / "vocab.json").exists():
        return (
            "the folder has its older form, vocab.json and merges.txt: make it with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return "expected a Hugging Face folder with a tokenizer"


def _token_text(value: str | Mapping[str, Any]) -> str:
    """The text of a special token, which is written as a string or as `{"content": ...}`."""
    return value if isinstance(value, str) else str(value["content"])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it names the special tokens. Copy it from the model's folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not a JSON object")
    return config if "added_tokens_decoder" in config else {**config, **_read_older_names(folder)}


def _read_older_names(folder: Path) -> dict[str, Any]:
    """The special tokens of `special_tokens_map.json`, which transformers reads where tokens are not described."""
    path = folder / "special_tokens_map.json"
    if not path.is_file():
        return {}
    names = read_json(path)
    if not isinstance(names, dict):
        raise UserError(f"{path}: holds {type(names).__name__}, not a JSON object")
    return {name: names[name] for name in SPECIAL_TOKENS if names.get(name)}


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name, from the files that transformers 5 writes. Where there are none, from the config."""
    files = [(DEFAULT, folder / CHAT_TEMPLATE_FILE)]
    files += [(path.stem, path) for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    if found := {name: read_text(path) for name, path in files if path.is_file()}:
        return found
    return templates_in(config)


def templates_in(config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates in a `tokenizer_config.json`, by name."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {DEFAULT: template} if template else {}
