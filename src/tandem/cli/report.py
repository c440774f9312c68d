"""`tandem report`: write a page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from tandem.cli.arguments import parse
from tandem.files.publish import write_text_atomically
from tandem.inference.sampling import Sampling
from tandem.options import Options, PathText, positional
from tandem.report.page import render
from tandem.report.page_file import check_page
from tandem.report.run_folder import Run, read_runs

DESCRIPTION = (
    "Write one HTML page about one or several runs: curves, settings, data, checkpoints and events. The page needs no "
    "other files."
)
PAGE = "report.html"


@dataclass(frozen=True)
class ReportOptions(Options):
    """Options of `tandem report`."""

    runs: tuple[PathText, ...] = field(metadata=positional("RUN..."))
    """The --save folder of each run. Several runs are compared."""
    _: KW_ONLY
    output: PathText | None = None
    """File for the page; default: report.html in the first run's folder."""
    ask: tuple[str, ...] = ()
    """Ask the newest checkpoint of each run these prompts, and show the answers."""
    max_new_tokens: int = 64
    """With --ask: largest number of tokens in an answer."""


def run(argv: Sequence[str]) -> None:
    options = parse(ReportOptions, "report", DESCRIPTION, argv)
    if options.output:
        check_page(options.output)
    runs = read_runs(options.runs)
    path = Path(options.output) if options.output else runs[0].folder / PAGE
    write_text_atomically(path, render(runs, answers_of(runs, options)))
    print(path)


def answers_of(runs: Sequence[Run], options: ReportOptions) -> list[tuple[str, list[str]]]:
    """Each prompt of --ask with the answer of each run's newest checkpoint."""
    if not options.ask:
        return []
    from tandem.inference.chat import open_model  # imported late: engines take a while
    from tandem.inference.options import LoadOptions

    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    answers = [open_model(LoadOptions(str(run.folder))).answer(options.ask, sampling) for run in runs]
    return list(zip(options.ask, map(list, zip(*answers))))
