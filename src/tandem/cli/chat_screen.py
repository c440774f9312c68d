"""Answers on a terminal: Markdown while it is written, thoughts apart, two answers side by side."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tandem.inference.answers import Piece

SECONDS = 0.08  # between two pictures
THOUGHT = Style(dim=True, italic=True)
NARROW = 72  # columns: below, two answers stand one under the other
_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
# an empty line, and then the beginning of a block that belongs to no list before it
_BORDER = re.compile(r"\n[ \t]*\n+(?=[^\s\d*+>|-])")


def whole_blocks(text: str) -> int:
    """How many characters at the beginning of a Markdown text are blocks that nothing later can change.

    >>> whole_blocks("One.\\n\\nTwo")
    6
    """
    end = 0
    for border in _BORDER.finditer(text):
        if len(_FENCE.findall(text[: border.start()])) % 2 == 0:  # not inside code
            end = border.end()
    return end


class Tail:
    """The last lines of a text, as many as fit on the screen."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()


class OneAnswer:
    """Shows one answer. Blocks that are whole are printed once and scroll away; the rest is drawn again and again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._text, self._kind = "", ""
        self._drawn = 0.0

    def show(self, piece: Piece) -> None:
        if not self._console.is_terminal:
            if piece.kind == "text":
                print(piece.text, end="", flush=True)
            return
        if piece.kind != self._kind:
            self._end_part()
            self._kind = piece.kind
        if piece.kind == "thought":
            self._console.print(Text(piece.text, THOUGHT), end="", soft_wrap=True)
            return
        self._text += piece.text
        if time.monotonic() - self._drawn >= SECONDS:
            self._draw()

    def end(self) -> None:
        """Print what is left."""
        self._end_part()
        if not self._console.is_terminal:
            print(flush=True)

    def _draw(self) -> None:
        if whole := whole_blocks(self._text):
            self._stop()
            self._console.print(Markdown(self._text[:whole]))
            self._console.print()
            self._text = self._text[whole:]
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="visible")
            self._live.start()
        self._live.update(Tail(Markdown(self._text)), refresh=True)
        self._drawn = time.monotonic()

    def _end_part(self) -> None:
        self._stop()
        if self._kind == "thought" and self._console.is_terminal:
            self._console.print("\n")
        elif self._text.strip():
            self._console.print(Markdown(self._text))
        self._text, self._kind, self._drawn = "", "", 0.0

    def _stop(self) -> None:
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()
            self._live = None


class SideBySide:
    """Shows several answers to one question, each under its model's name."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console, self._names = console, names
        self._texts = [{"thought": "", "text": ""} for _ in names]
        self._live: Live | None = None
        self._drawn = 0.0

    def show(self, number: int, piece: Piece) -> None:
        self._texts[number][piece.kind] += piece.text
        if self._console.is_terminal and time.monotonic() - self._drawn >= SECONDS:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Tail(self._picture()), refresh=True)
            self._drawn = time.monotonic()

    def end(self) -> None:
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()
        if self._console.is_terminal:
            self._console.print(self._picture())
            return
        for name, said in zip(self._names, self._texts):
            print(f"{name}: {said['text']}", flush=True)

    def _picture(self) -> RenderableType:
        is_narrow = self._console.width < NARROW
        table = Table.grid(padding=(0, 2), expand=True)
        parts = [self._part(number) for number in range(len(self._names))]
        for _ in parts[:1] if is_narrow else parts:
            table.add_column(ratio=1)
        titles = [Text(name, "bold") for name in self._names]
        if is_narrow:
            for title, part in zip(titles, parts):
                table.add_row(title)
                table.add_row(part)
        else:
            table.add_row(*titles)
            table.add_row(*parts)
        return table

    def _part(self, number: int) -> RenderableType:
        said = self._texts[number]
        if not said["thought"]:
            return Markdown(said["text"])
        part = Table.grid()
        part.add_row(Text(said["thought"].strip(), THOUGHT))
        part.add_row("")
        part.add_row(Markdown(said["text"]))
        return part
