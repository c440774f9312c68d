"""What is typed in a conversation: lines with history, several lines at once, and commands."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tandem.cli.given_input import open_input, typed_line

BLOCK = '"""'
MOST_LINES = 1000  # of the history
PROMPT, MORE = ">>> ", "... "


def read_message(prompt: str = PROMPT) -> str | None:
    r"""What is typed, without spaces around it; None at the end of the input.

    A line that ends with a backslash goes on in the next one. Lines between two \"\"\" belong together.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    line = typed_line(prompt)
    if line is None:
        return None
    if line.strip().startswith(BLOCK):
        return _block(line.strip().removeprefix(BLOCK))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        if (line := typed_line(MORE)) is None:
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _block(first: str) -> str:
    lines = [first]
    while BLOCK not in lines[-1]:
        line = typed_line(MORE)
        if line is None:
            break
        lines.append(line)
    lines[-1] = lines[-1].partition(BLOCK)[0]
    return "\n".join(lines).strip()


@contextmanager
def line_editing(history: Path | None, words: Sequence[str]) -> Iterator[None]:
    """On a terminal: edit lines, complete `words`, and keep the history of earlier conversations in a file.

    Args:
        history: None keeps none.
    """
    open_input()
    readline = _readline()
    if readline is None:
        yield
        return
    readline.set_history_length(MOST_LINES)
    readline.set_completer(lambda text, number: _completion(text, number, words))
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    if history is not None:
        with suppress(OSError):
            readline.read_history_file(history)
    try:
        yield
    finally:
        if history is not None:
            with suppress(OSError):  # a folder that cannot be written to: only the history is lost
                _write(readline, history)


def history_file() -> Path:
    """Where earlier lines are kept."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tandem" / "chat_history"


def _write(readline: Any, history: Path) -> None:
    history.parent.mkdir(parents=True, exist_ok=True)
    work = history.with_name(f".incomplete-{history.name}")
    os.close(os.open(work, os.O_CREAT | os.O_WRONLY, 0o600))  # what one says is for nobody else
    readline.write_history_file(work)
    work.replace(history)


def _readline() -> Any:
    if not sys.stdin.isatty():
        return None
    try:
        return importlib.import_module("readline")
    except ImportError:  # some builds of Python have none
        return None


def _completion(text: str, number: int, words: Sequence[str]) -> str | None:
    matches = [word for word in words if text.startswith("/") and word.startswith(text)]
    return matches[number] if number < len(matches) else None
