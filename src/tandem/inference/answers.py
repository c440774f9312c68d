"""An answer while it is written: text, thoughts and calls of tools, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.data.templates.messages import ToolCall
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.inference import tool_calls
from tandem.inference.text import StopStrings, TokenText, begun

THINK, END_THINK = "<think>", "</think>"
Kind = Literal["text", "thought", "call"]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: what is added to the text or to the thought; "" for a call.
        call: a call of a tool, whole.
    """

    kind: Kind
    text: str = ""
    call: ToolCall | None = None


class Answer:
    """The pieces of an answer, from its tokens. It does not matter how many tokens are fed at a time.

    Attributes:
        parts: the reader of thoughts and calls; with None, everything is text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), parts: Parts | None = None) -> None:
        self._text, self._stop, self._parts = TokenText(tokenizer), StopStrings(stop), parts

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: then more tokens change nothing."""
        return self._stop.found is not None

    def feed(self, tokens: Sequence[int]) -> list[Piece]:
        pieces: list[Piece] = []
        for token in tokens:
            if not self.stopped:
                pieces += self._read(self._stop.feed(self._text.feed(token)))
        return joined(pieces)

    def end(self) -> list[Piece]:
        """The pieces that waited for more."""
        rest = "" if self.stopped else self._stop.feed(self._text.end()) + self._stop.end()
        return joined([*self._read(rest), *(self._parts.end() if self._parts else ())])

    def _read(self, text: str) -> list[Piece]:
        if self._parts:
            return self._parts.feed(text)
        return [Piece("text", text)] if text else []


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours of one kind joined, and without empty ones."""
    result: list[Piece] = []
    for piece in pieces:
        if piece.call is None and not piece.text:
            continue
        if result and piece.call is None and result[-1].kind == piece.kind:
            result[-1] = Piece(piece.kind, result[-1].text + piece.text)
        else:
            result.append(piece)
    return result


class Parts:
    """Separates the thought before an answer, and the calls in it, from its text.

    A thought stands at the beginning only. Line ends around it, and between a text and a call, belong to the form and
    are left out. A call that cannot be read stays text.

    Args:
        in_thought: whether the prompt has begun the thought.
        tools: the JSON text of each tool. Without tools, calls stay text.
    """

    def __init__(self, in_thought: bool = False, tools: Sequence[str] = ()) -> None:
        self._tools = tuple(tools)
        self._state = self._thought if in_thought else self._beginning
        self._waiting = ""
        self._blank = ""  # the line ends before a call, if it turns out to be none
        self._ended = False
        self._at_start = True  # of a thought or a text: its line ends are left out

    def feed(self, text: str) -> list[Piece]:
        self._waiting += text
        return list(self._steps())

    def end(self) -> list[Piece]:
        self._ended = True
        return list(self._steps())

    def _steps(self) -> Iterator[Piece]:
        """Pieces as far as they are sure. A state yields what it can, and says whether it gave way to another one."""
        while True:
            state = self._state
            yield from state()
            if self._state == state:
                return

    def _beginning(self) -> Iterator[Piece]:
        text = self._waiting.lstrip()
        if text.startswith(THINK):
            self._waiting, self._state = text[len(THINK) :], self._thought
        elif self._ended or not THINK.startswith(text):
            self._state, self._at_start = self._text, False  # the line ends are the answer's own
        yield from ()

    def _thought(self) -> Iterator[Piece]:
        if self._at_start:
            self._waiting = self._waiting.lstrip("\n")
            self._at_start = not self._waiting
        text, end, rest = self._waiting.partition(END_THINK)
        if end:
            yield Piece("thought", text.rstrip("\n"))
            self._waiting, self._state, self._at_start = rest, self._text, True
        else:
            yield Piece("thought", self._take(END_THINK))

    def _text(self) -> Iterator[Piece]:
        if self._at_start:
            self._waiting = self._waiting.lstrip("\n")
            self._at_start = not self._waiting
        if not self._tools:
            text, self._waiting = self._waiting, ""
            yield Piece("text", text)
            return
        text, begin, rest = self._waiting.partition(tool_calls.BEGIN)
        if begin:
            yield Piece("text", text.rstrip("\n"))
            self._blank = text[len(text.rstrip("\n")) :]
            self._waiting, self._state = rest, self._call
        else:
            yield Piece("text", self._take(tool_calls.BEGIN))

    def _call(self) -> Iterator[Piece]:
        text, end, rest = self._waiting.partition(tool_calls.END)
        if not end and not self._ended:
            return
        call = tool_calls.parse_call(text, self._tools) if end else None
        if call is None:
            yield Piece("text", f"{self._blank}{tool_calls.BEGIN}{text}{end}")
        else:
            yield Piece("call", call=call)
            self._at_start = True
        self._waiting, self._state = rest, self._text

    def _take(self, word: str) -> str:
        """Take what is sure to be before `word`: not the line ends that may precede it. At the end, all."""
        text = self._waiting
        if self._ended:
            self._waiting = ""
            return text
        sure = text[: len(text) - begun(text, word)].rstrip("\n")
        self._waiting = text[len(sure) :]
        return sure
