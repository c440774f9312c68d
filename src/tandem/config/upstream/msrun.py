"""Turns msrun's flags for the number of processes into torchrun's, for scripts that were written for msrun."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.errors import UserError

LOCAL, ALL = "--local_worker_num", "--worker_num"


def as_torchrun(argv: Sequence[str]) -> list[str]:
    """Turn `--local_worker_num L --worker_num W` into `--nproc-per-node L --nnodes W/L`. Other words stay the same.

    >>> as_torchrun(["--worker_num", "16", "--local_worker_num", "8", "--lr", "1"])
    ['--nproc-per-node', '8', '--nnodes', '2', '--lr', '1']

    Raises:
        UserError: only one of the two is given, a value is not a positive number, or W is not a multiple of L.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.replace("-", "_").replace("__", "--", 1)
        if name in (LOCAL, ALL):
            given[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if not given:
        return rest
    typed = " ".join(f"{name} {value}" for name, value in given.items())
    if len(given) == 1 or not all(value.isdigit() and int(value) for value in given.values()):
        raise UserError(f"{typed}: expected {ALL} (processes on all machines) and {LOCAL} (processes on this machine)")
    local, workers = int(given[LOCAL]), int(given[ALL])
    if workers % local:
        raise UserError(f"{typed}: expected {ALL} to be a multiple of {LOCAL}")
    return ["--nproc-per-node", str(local), "--nnodes", str(workers // local), *rest]
