"""`tandem doctor`: can a run start here?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tandem.cli.arguments import parse
from tandem.doctor import examine
from tandem.errors import UserError
from tandem.options import Options

DESCRIPTION = "Show versions and devices, what is missing and how to install it. Fails when no run could start."
WIDTH = 140  # columns of the table when the output is not a terminal


@dataclass(frozen=True)
class Flags(Options):
    """`tandem doctor` has no options."""


def run(argv: Sequence[str]) -> None:
    parse(Flags, "doctor", DESCRIPTION, argv)
    diagnosis = examine()
    table = Table(show_header=False, box=None, padding=(0, 2))
    for finding in diagnosis.findings:
        mark = Text("!", style="yellow") if finding.remedy else Text("✓", style="green")
        table.add_row(mark, Text(finding.subject), Text(finding.state))
    console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(table)
    for finding in diagnosis.findings:
        if finding.remedy:  # on one line, so that a command can be copied from a narrow terminal
            console.print(Text(f"  ! {finding.subject}: {finding.remedy}"), soft_wrap=True)
    if diagnosis.blockers:
        raise UserError("no run could start here:\n  " + "\n  ".join(diagnosis.blockers))
    print("a run can start here")
