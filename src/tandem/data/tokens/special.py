"""Special tokens that the texts of data spell, such as `<|im_end|>` inside a message."""

from __future__ import annotations

import re

import numpy as np

from tandem.data.tokens.encoder import Engine, Texts, end_to_end
from tandem.data.tokens.tokenizer import Tokenizer

_MARK = "\ue004"  # a character of private use, before a special token that is to be spelled out
_THOUGHT_TAGS = ("<think>", "</think>")  # where these are special tokens, texts mean them


class SpecialTokens:
    """The special tokens of a tokenizer, in texts.

    Attributes:
        are_special: bool [vocabulary], by id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens.items()
            if token.special and token.content not in _THOUGHT_TAGS
        }
        self.are_special = np.zeros(max([len(tokenizer), *(i + 1 for i in self._ids.values())]), bool)
        self.are_special[list(self._ids.values())] = True
        self._first_characters = tuple({text[0] for text in self._ids})
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._to_encode = re.compile(f"(?<!{_MARK})({self._pattern.pattern})")

    def count(self, text: str) -> int:
        """How many special tokens a text spells."""
        if not any(character in text for character in self._first_characters):  # the usual case, made fast
            return 0
        return len(self._pattern.findall(text))

    def marked(self, text: str) -> str:
        """The text with a mark before each special token, so that `SpellingEngine` encodes its letters."""
        return self._pattern.sub(lambda match: _MARK + match.group(), text)

    def parts(self, marked: str) -> list[int | str]:
        """A marked text as ids of the special tokens without a mark, and the texts between them, without marks."""
        parts: list[int | str] = []
        for number, part in enumerate(self._to_encode.split(marked)):
            if part:
                parts.append(self._ids[part] if number % 2 else part.replace(_MARK, ""))
        return parts


class SpellingEngine:
    """Encodes marked special tokens as the letters that they are written with; all else as another engine does.

    Args:
        add_special_tokens: as the other engine has it, such as for a token at the beginning of each text.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, special: SpecialTokens, add_special_tokens: bool) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._special = special
        self._add_special_tokens = add_special_tokens
        self.name = engine.name
        self.threads_suffice = engine.threads_suffice

    def encode(self, texts: Texts, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        strings = [text.decode() if isinstance(text, bytes) else text for text in texts]
        if not any(_MARK in text for text in strings):
            return self._engine.encode(texts, end)
        return end_to_end([self._ids(text) for text in strings], end)

    def _ids(self, text: str) -> np.ndarray:
        if _MARK not in text:
            return self._engine.encode([text])[0]
        parts = self._special.parts(text)
        if len(parts) == 1 and isinstance(parts[0], str):
            return self._spelled(parts[0], self._add_special_tokens)
        ids = [np.array([p], np.int32) if isinstance(p, int) else self._spelled(p, False) for p in parts]
        return np.concatenate(ids)

    def _spelled(self, text: str, add_special_tokens: bool) -> np.ndarray:
        (ids,) = self._tokenizer.encode_spelled([text], add_special_tokens)
        return np.array(ids, np.int32)
