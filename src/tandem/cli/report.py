"""`tandem report`: a page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.config.parsing import parse_dataclass
from tandem.files.publish import write_text_atomically
from tandem.report.page import render
from tandem.report.page_file import check_page
from tandem.report.run_folder import read_runs

DESCRIPTION = (
    "tandem report RUN_DIR [RUN_DIR ...] [--output FILE]: curves, settings, data, checkpoints and events of one or "
    "several runs as one self-contained HTML page."
)
PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Options."""

    output: str | None = None
    """The page; default: report.html in the first run's folder."""


def run(argv: Sequence[str]) -> None:
    words, folders = list(argv), []
    while words and not words[0].startswith("-"):
        folders.append(words.pop(0))
    flags = parse_dataclass(Flags, "report", DESCRIPTION, words)
    if flags.output:
        check_page(flags.output)
    runs = read_runs(folders)
    path = Path(flags.output) if flags.output else runs[0].folder / PAGE
    write_text_atomically(path, render(runs))
    print(path)
