"""Texts to ids, with the `tokenizers` library, or with `gigatoken` where a test shows that it gives the same ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from tandem.data.tokens.tokenizer import Tokenizer

# Texts on which tokenizers are known to disagree. They are compared in addition to a sample of the input.
_PROBES = [
    "",
    " ",
    "  two  spaces ",
    "\n\n \r\n\t\n x\n",
    "it's I'LL we've",
    "12345 1,234.5e-6 ٣٤",
    "e\u0301 \u00e9 \ufb01 \u2126 \uac00 \u1112\u1161\u11ab",  # composed and decomposed
    "中文，标点。日本語のテキスト",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1f3 a\u200bb \u00a0 \u3000 \u2028 \ufeff",
    "def f(x):\n    return {'a': [x ** 2]}  # ok\n",
    "\u0338 \u0301",  # composes with what is before it
    "العربية עברית ไทย हिन्दी Ελληνικά",
    "\x00\x01\x7f\x80",
]


Texts = Sequence[str] | Sequence[bytes]  # bytes are UTF-8


class Engine(Protocol):
    """Encodes texts on one core, without holding Python's global lock.

    Attributes:
        threads_suffice: whether threads do. Sending tokens between processes would take longer than encoding.
    """

    name: str
    threads_suffice: bool

    def encode(self, texts: Texts, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, int32 [t], and the number of ids of each text, int64 [texts].

        `end`, if given, is an id to add after each text.
        """
        ...


class TokenizersEngine:
    """The `tokenizers` library. Its ids are the reference."""

    name = "tokenizers"
    threads_suffice = False

    def __init__(self, tokenizer: Tokenizer, add_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens

    def encode(self, texts: Texts, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        strings = [text.decode() if isinstance(text, bytes) else text for text in texts]
        ids = self._tokenizer.encode_batch(strings, self._add_special_tokens)
        return end_to_end([np.array(sequence, np.int32) for sequence in ids], end)


class Separator(NamedTuple):
    """A special token to put between texts."""

    text: str
    id: int


class GigatokenEngine:
    """The `gigatoken` library, which is faster. It never adds special tokens.

    Up to `threads` threads may encode at the same time. With a `separator` (see `find_separator`), many texts are
    encoded as one, which takes less time.
    """

    name = "gigatoken"
    threads_suffice = True

    def __init__(
        self, tokenizer_file: str | os.PathLike[str], threads: int = 1, separator: Separator | None = None
    ) -> None:
        self._file = os.fspath(tokenizer_file)
        self._threads = threads
        self._separator = separator

    def encode(self, texts: Texts, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        together = self._encode_together(texts, end, self._separator) if self._separator else None
        return together or end_to_end([self._ids(_utf8(text)) for text in texts], end)

    def _encode_together(
        self, texts: Texts, end: int | None, separator: Separator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """As `encode`, for all texts as one; None if a text contains the separator."""
        ids = self._ids(_each_followed(texts, separator.text))
        places = np.flatnonzero(ids == separator.id)
        if len(places) != len(texts):
            return None
        lengths = np.diff(places, prepend=-1)
        if end is None:
            return np.delete(ids, places), lengths - 1
        ids[places] = end
        return ids, lengths

    def _ids(self, text: bytes) -> np.ndarray:
        import gigatoken  # here, because it loads slowly and may not be installed

        # A matrix of one row. The library's other functions make callers wait for each other, or load `awkward`, which
        # is slow. Up to 2 MB are encoded in the caller's thread, with any free encoder; more is divided among the
        # library's threads.
        rows, _ = self._backend.encode_batch_padded(gigatoken.BytesSource(text), 0)
        return np.asarray(rows[0]).view(np.int32)

    @cached_property
    def _backend(self) -> Any:
        import gigatoken

        backend = gigatoken.Tokenizer(self._file)
        with environment("RAYON_NUM_THREADS", str(self._threads)):
            # The first text starts the library's threads, and makes an encoder for each.
            backend.encode_batch_padded(gigatoken.BytesSource(b""), 0)
        return backend

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_threads": self._threads, "_separator": self._separator}


def choose_engine(tokenizer: Tokenizer, reference: Engine, sample: Sequence[str], threads: int = 1) -> Engine:
    """`gigatoken` for `threads` threads, if it is installed and gives the same ids as `reference`; else `reference`.

    They are compared on `sample`, on each added token, and on texts that are known to be hard.
    """
    if tokenizer.added_tokens_look_around:  # gigatoken looks only at the characters, and few texts would show it
        return reference
    added = [token.content for token in tokenizer.added_tokens.values()]
    groups = (_PROBES, added, sample)
    expected = [reference.encode(texts) for texts in groups]
    # Some tokenizers treat the first text and one after a separator differently. Then each text is encoded alone.
    for separator in dict.fromkeys((find_separator(tokenizer, sample), None)):
        fast = GigatokenEngine(tokenizer.folder / "tokenizer.json", threads, separator)
        try:
            actual = [fast.encode(texts) for texts in groups]
        except (ImportError, ValueError, TypeError, NotImplementedError, RuntimeError, OSError):
            return reference  # not installed, or a kind of tokenizer that it does not support
        if all(np.array_equal(a, b) for pair in zip(actual, expected) for a, b in zip(*pair)):
            return fast
    return reference


def find_separator(tokenizer: Tokenizer, sample: Iterable[str]) -> Separator | None:
    """A special token to put between texts, which no text of the sample contains.

    None if there is no such token. A tokenizer searches for added tokens from left to right. So it always recognises
    this one, unless another added token overlaps it from the left, or begins with it. Then it is not chosen.
    """
    tokens = tokenizer.added_tokens
    if tokenizer.added_tokens_look_around:
        return None
    contents = [token.content for token in tokens.values()]
    for token_id, token in reversed(tokens.items()):  # the last tokens are the rarest in texts
        text = token.content
        is_hidden = any(text[0] in other[1:] or (other.startswith(text) and other != text) for other in contents)
        if token.special and not is_hidden and not any(text in example for example in sample):
            return Separator(text, token_id)
    return None


def _each_followed(texts: Texts, separator: str) -> bytes:
    if texts and isinstance(texts[0], bytes):
        return separator.encode().join([*texts, b""])
    return separator.join([*texts, ""]).encode()


def _utf8(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def end_to_end(ids: Sequence[np.ndarray], end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The result of `Engine.encode`, made of the ids of each text, int32 [t]."""
    tail = np.array([] if end is None else [end], np.int32)
    lengths = np.array([len(sequence) + len(tail) for sequence in ids], np.int64)
    return np.concatenate([np.empty(0, np.int32), *(part for sequence in ids for part in (sequence, tail))]), lengths


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the `with`, here and for processes that are started there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
