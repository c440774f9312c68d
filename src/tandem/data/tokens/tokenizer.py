"""The tokenizer of a Hugging Face folder, over the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tandem.data.tokens.chat_template import render_chat_template
from tandem.errors import UserError

CHAT_TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """`tokenizer.json`, with the special tokens of `tokenizer_config.json` and the chat template.

    Ids equal those of `transformers.AutoTokenizer` on the same folder.

    Attributes:
        eos_id, pad_id, bos_id: ids of the special tokens; None when the folder names none.
        sha256: of `tokenizer.json`, the identity that data and checkpoints record.
        chat_template: Jinja source, or None.

    Raises:
        UserError: a file is missing or malformed, or a special token is not in the vocabulary.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; expected a Hugging Face folder. A folder with only vocab.json and merges.txt "
                f"gains it by AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise UserError(f"{path}: not a tokenizer of the tokenizers library: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_config(self.folder)
        self._add_missing_tokens(config.get("added_tokens_decoder") or {})
        self.eos_id = self._special_id(config, "eos_token")
        self.pad_id = self._special_id(config, "pad_token")
        self.bos_id = self._special_id(config, "bos_token")
        self.chat_template = _read_chat_template(self.folder, config)
        self._special_tokens = {
            name: _token_text(config[name]) for name in ("bos_token", "eos_token", "pad_token") if config.get(name)
        }

    def __len__(self) -> int:
        """Tokens of the vocabulary, added ones included (151,669 for Qwen3; the embedding has more rows)."""
        return self._length

    @cached_property
    def _length(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of one text; special tokens written in the text become their ids."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of many texts; uses as many cores as TOKENIZERS_PARALLELISM allows."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    @property
    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """By id: texts that become one token wherever they stand, special tokens among them."""
        return self._tokenizer.get_added_tokens_decoder()

    @property
    def added_tokens_look_around(self) -> bool:
        """Whether some added token is found by more than its own characters: as a whole word, with the space around it,
        or in text that was normalised before."""
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
            UserError: the vocabulary lacks it.
        """
        token_id = self.token_to_id(token)
        if token_id is None:
            raise UserError(f"{self.folder}: the vocabulary has no token {token!r}")
        return token_id

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The model's own chat template rendered, as transformers does; `variables` (`enable_thinking`, `tools`) go to
        the template."""
        if self.chat_template is None:
            raise UserError(f"{self.folder}: has no chat template (chat_template.jinja or in tokenizer_config.json)")
        return render_chat_template(
            self.chat_template,
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            **{**self.chat_variables, **variables},
        )

    @property
    def chat_variables(self) -> dict[str, Any]:
        """What transformers gives a chat template beside messages."""
        return {"tools": None, "documents": None, **self._special_tokens}

    def _add_missing_tokens(self, decoder: Mapping[str, Any]) -> None:
        """Older folders keep some added tokens in `tokenizer_config.json` alone."""
        for token_id, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
            if self._tokenizer.token_to_id(entry["content"]) is None:
                fields = {
                    key: entry[key]
                    for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                    if key in entry
                }
                self._tokenizer.add_tokens([tokenizers.AddedToken(entry["content"], **fields)])
            found = self._tokenizer.token_to_id(entry["content"])
            if found != int(token_id):
                raise UserError(
                    f"{self.folder / 'tokenizer_config.json'}: token {entry['content']!r} is {token_id} there, "
                    f"but {found} in tokenizer.json; the files belong to different models"
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


def _token_text(value: str | Mapping[str, Any]) -> str:
    """A special token is written as a string or as `{"content": ...}`."""
    return value if isinstance(value, str) else str(value["content"])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it names the special tokens. Copy it from the model's folder")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """transformers 5 keeps it in `chat_template.jinja`, which wins; older versions in `tokenizer_config.json`."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template
