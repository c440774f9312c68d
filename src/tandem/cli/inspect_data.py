"""`tandem inspect data PREFIX`: show what a preprocessed dataset contains, and some samples as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tandem.cli.arguments import parse
from tandem.data.preprocess.noticed import told_by_record
from tandem.data.record import read_record, record_of
from tandem.data.statistics import DataView, Statistics
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.options import Options, PathText, positional
from tandem.report.data_page import write_page
from tandem.report.page_file import check_page

DESCRIPTION = "Show what preprocessed data contain: counts, lengths, and samples, with trained text in green."
PLAIN_WIDTH = 140  # columns when the output is not a terminal
BAR_WIDTH = 40


@dataclass(frozen=True)
class InspectDataOptions(Options):
    """Options of `tandem inspect data`."""

    prefix: PathText = field(metadata=positional("PREFIX"))
    """The prefix of the data: PREFIX_text_document, or the output prefix of instruction data."""
    _: KW_ONLY
    tokenizer_name_or_path: PathText | None = None
    """Folder of the tokenizer; default: the one in the record next to the data."""
    show: int = 3
    """Number of samples to print."""
    html: PathText | None = None
    """Also write an HTML page to this file."""


def run(argv: Sequence[str]) -> None:
    options = parse(InspectDataOptions, "inspect data", DESCRIPTION, argv)
    if options.html:
        check_page(options.html)
    console = make_console()
    view = DataView(options.prefix)
    console.print(overview(options.prefix, view.statistics()))
    for line in told_by_record(record) if (record := record_of(options.prefix)) else ():
        print(f"> {line}")
    tokenizer = _tokenizer(options) if options.show else None
    if tokenizer:
        if record and record["tokenizer"]["sha256"] != tokenizer.sha256:
            print(f"> {tokenizer.folder} is not the tokenizer that made these data: the texts may be others")
        show_samples(console, view, tokenizer, options.show)
    if options.html:
        write_page(options.html, view, tokenizer, options.show)
        print(f"wrote {options.html}")


def make_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def overview(prefix: str, statistics: Statistics) -> Table:
    table = Table("", "", show_header=False, title=prefix, title_justify="left")
    table.add_row("sequences", f"{statistics.sequences:,}")
    if statistics.documents != statistics.sequences:
        table.add_row("documents in them", f"{statistics.documents:,}")
    table.add_row("tokens", f"{statistics.tokens:,}")
    share = statistics.trained_tokens / max(1, statistics.tokens)
    table.add_row("trained tokens", f"{statistics.trained_tokens:,} ({share:.1%})")
    table.add_row("fill rate", f"{statistics.fill_rate:.2%}")
    most = max((count for *_, count in statistics.histogram), default=1)
    for first, last, count in statistics.histogram:
        bar = "#" * round(BAR_WIDTH * count / max(1, most))
        table.add_row(f"{first:,} .. {last:,} tokens", f"{bar} {count:,}")
    return table


def show_samples(console: Console, view: DataView, tokenizer: Tokenizer, count: int) -> None:
    """Print the first samples. Trained text is green, or in [[ ]] when there are no colours."""
    coloured = console.color_system is not None
    for index in range(min(count, len(view))):
        text = Text()
        for span in view.spans(index, tokenizer):
            marked = view.kind.has_labels and span.trained
            shown = f"[[{span.text}]]" if marked and not coloured else span.text
            text.append(shown, style="green" if marked else "")
        console.rule(view.title(index), align="left")
        console.print(text, soft_wrap=True)


def _tokenizer(options: InspectDataOptions) -> Tokenizer:
    if options.tokenizer_name_or_path:
        return Tokenizer(options.tokenizer_name_or_path)
    path_and_record = read_record(options.prefix)
    if path_and_record is None:
        raise UserError(
            f"{options.prefix}: there is no record next to the data that names the tokenizer; give "
            f"--tokenizer-name-or-path, or --show 0"
        )
    path, record = path_and_record
    folder = record["options"]["tokenizer_name_or_path"]  # None where merged parts name different folders
    if folder is None or not os.path.isdir(folder):
        place = "names no single folder of" if folder is None else f"names {folder}, which is not here, as"
        raise UserError(
            f"{path}: {place} the tokenizer that made these data; give its folder with --tokenizer-name-or-path, or "
            f"--show 0"
        )
    tokenizer = Tokenizer(folder)
    if tokenizer.sha256 != record["tokenizer"]["sha256"]:
        raise UserError(
            f"{path}: {tokenizer.folder} is not the tokenizer that made these data; give the right one with "
            f"--tokenizer-name-or-path"
        )
    return tokenizer
