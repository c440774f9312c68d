"""The errors that tell a user what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected, how to fix it, and where.

    The command line prints only the message, without a traceback, and exits with code 2.

    >>> UserError("--lr -1: expected 0 or more").flags
    ('--lr',)

    Attributes:
        problems: everything that is wrong, one text for each problem. Most errors have one problem.
        flags: the flags that the message names, such as `--seq-length`.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", str(self))))


class RunStopped(Exception):
    """A signal stopped the run. What it trained is saved, and the same command continues it. The command line exits
    with code 75 (`EX_TEMPFAIL` of sysexits.h)."""


class Problems:
    """What is wrong with an input, collected from several checks, so that one error says all of it.

    >>> problems = Problems()
    >>> for rate in (-1, -2):
    ...     with problems.noted():
    ...         raise UserError(f"--lr {rate}: expected 0 or more")
    >>> problems.texts
    ['--lr -1: expected 0 or more', '--lr -2: expected 0 or more']
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside this context a UserError ends the context only, and is noted."""
        try:
            yield
        except UserError as error:
            self.texts += error.problems

    def raise_all(self) -> None:
        raise_all(self.texts)


def check_all(*checks: Callable[[], object]) -> None:
    """Make all these checks. What they raise becomes one UserError with all problems."""
    problems = Problems()
    for check in checks:
        with problems.noted():
            check()
    problems.raise_all()


def raise_all(problems: Iterable[str]) -> None:
    """Raise one UserError with all these problems. Without problems, do nothing."""
    if texts := tuple(dict.fromkeys(problems)):
        raise UserError(*texts)


def nearest(name: str, valid: list[str]) -> str:
    """`"; did you mean 'x'?"` with the closest valid name, or an empty string.

    >>> nearest("train_itrs", ["train_iters", "lr"])
    "; did you mean 'train_iters'?"
    """
    import difflib

    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
