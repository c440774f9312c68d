"""The text of an answer while its tokens come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.data.tokens.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what decoding writes for a character whose last bytes are still to come


class TokenText:
    """Decodes tokens one by one. The pieces of text, with the one of `end`, are the text of all tokens together.

    Special tokens are left out. An incomplete character waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those of the last piece, which say how the next one begins, and those that wait
        self._given = 0  # how many of them are in a piece already

    def feed(self, token: int) -> str:
        """The text that a token completes; "" where it completes none."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(INCOMPLETE):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return text

    def end(self) -> str:
        """What still waits: an incomplete character as it is."""
        text = self._new_text()
        self._given = len(self._ids)
        return text

    def _new_text(self) -> str:
        before, text = (self._decode(ids) for ids in (self._ids[: self._given], self._ids))
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StopStrings:
    """Lets text pass up to the first stop string. What may be the beginning of one waits.

    >>> stop = StopStrings(["END"])
    >>> stop.feed("one E"), stop.feed("N"), stop.feed("D two"), stop.found
    ('one ', '', '', 'END')

    Attributes:
        found: the stop string that has come; None before. After it nothing passes.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [text for text in strings if text]
        self._waiting = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        if self.found is not None:
            return ""
        text = self._waiting + text
        places = [(place, string) for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            place, self.found = min(places, key=lambda pair: pair[0])
            self._waiting = ""
            return text[:place]
        held = max((begun(text, string) for string in self._strings), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What still waits: it was no stop string."""
        text, self._waiting = self._waiting, ""
        return text


def begun(text: str, word: str) -> int:
    """How many characters at the end of `text` begin `word`, without being all of it.

    >>> begun("a <th", "<think>"), begun("a", "<think>")
    (3, 0)
    """
    longest = min(len(text), len(word) - 1)
    return next((length for length in range(longest, 0, -1) if word.startswith(text[-length:])), 0)
