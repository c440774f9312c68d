"""What turns texts into ids: the `tokenizers` library, or `gigatoken` where it proves to give the same ids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from tandem.data.tokenizer import Tokenizer

# Beside a sample of the input: what tokenizers are known to disagree on.
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
    "العربية עברית ไทย हिन्दी Ελληνικά",
    "\x00\x01\x7f\x80",
]


Texts = Sequence[str] | Sequence[bytes]  # bytes are UTF-8


class Engine(Protocol):
    """Encodes texts on one core; releases Python's global lock meanwhile."""

    name: str

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, int32 [t], and how many each has, int64 [texts]."""
        ...


class TokenizersEngine:
    """The reference."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer, add_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        strings = [text.decode() if isinstance(text, bytes) else text for text in texts]
        ids = self._tokenizer.encode_batch(strings, self._add_special_tokens)
        lengths = np.array([len(sequence) for sequence in ids], np.int64)
        return np.fromiter((i for sequence in ids for i in sequence), np.int32, int(lengths.sum())), lengths


class GigatokenEngine:
    """The fast one; never adds special tokens. So many `threads` may encode at a time."""

    name = "gigatoken"

    def __init__(self, tokenizer_file: str | os.PathLike[str], threads: int = 1) -> None:
        self._file = os.fspath(tokenizer_file)
        self._threads = threads

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        # Not `parallel=False`, whose calls wait for one another: there is one encoder for all of them. So does a caller
        # encode up to 2 MB itself, with whichever encoder is free; more is shared out among the library's threads.
        layout = self._backend.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.view(np.int32), np.diff(offsets)

    @cached_property
    def _backend(self) -> Any:
        import gigatoken  # here, because it is slow to load and need not be installed

        backend = gigatoken.Tokenizer(self._file)
        with environment("RAYON_NUM_THREADS", str(self._threads)):
            backend.encode_batch([""])  # the first text makes the library's threads, and an encoder for each
        return backend

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_threads": self._threads}


def choose_engine(tokenizer: Tokenizer, reference: Engine, sample: Sequence[str], threads: int = 1) -> Engine:
    """`gigatoken`, for so many threads, when it is installed and gives the ids of `reference` for `sample`, for each
    added token and for known hard texts; else `reference`."""
    fast = GigatokenEngine(tokenizer.folder / "tokenizer.json", threads)
    try:
        same = all(
            np.array_equal(ours, theirs)
            for texts in ([*_PROBES, *tokenizer.added_tokens], sample)
            for ours, theirs in zip(fast.encode(texts), reference.encode(texts))
        )
    except (ImportError, ValueError, TypeError, NotImplementedError, RuntimeError, OSError):
        return reference  # not installed, or not a kind of tokenizer that it knows
    return fast if same else reference


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable set meanwhile, here and in processes started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
