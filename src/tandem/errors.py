"""The error that is the user's to mend."""


class UserError(ValueError):
    """Bad input: says what was given, what was expected, how to fix it, and where.

    The command line prints its message alone, without a traceback, and exits with 2.
    """


class RunStopped(Exception):
    """A run was asked to stop, by a signal, and has saved what it saves. The command line exits with 75 (`EX_TEMPFAIL`
    of sysexits.h): the same command goes on."""


def nearest(name: str, valid: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest valid name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
