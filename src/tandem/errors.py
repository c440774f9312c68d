"""The errors that tell a user what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: says what was given, what was expected, how to fix it, and where.

    The command line prints its message alone, without a traceback, and exits with 2.

    Attributes:
        problems: everything that is wrong, one text each; most errors have one.
        flags: the flags that the message names, such as `--seq-length`.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", str(self))))


class RunStopped(Exception):
    """A run was asked to stop, by a signal, and has saved what it saves. The command line exits with 75 (`EX_TEMPFAIL`
    of sysexits.h): the same command goes on."""


def raise_all(problems: Iterable[str]) -> None:
    """Raise one UserError of all these problems; nothing when there are none."""
    if found := tuple(problems):
        raise UserError(*found)


def nearest(name: str, valid: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest valid name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
