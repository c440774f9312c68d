"""msrun's names for the processes of a job, as scripts that were written for it pass them: turned into torchrun's."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.errors import UserError

LOCAL, ALL = "--local_worker_num", "--worker_num"


def as_torchrun(argv: Sequence[str]) -> list[str]:
    """`--local_worker_num L --worker_num W` as `--nproc-per-node L --nnodes W/L`; the other words are kept.

    Raises:
        UserError: one of the two stands alone, is no positive number, or L does not divide W.
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
    said = " ".join(f"{name} {value}" for name, value in given.items())
    if len(given) == 1 or not all(value.isdigit() and int(value) for value in given.values()):
        raise UserError(f"{said}: expected {ALL}, the processes of all machines, and {LOCAL}, those of this machine")
    local, workers = int(given[LOCAL]), int(given[ALL])
    if workers % local:
        raise UserError(f"{said}: every machine starts {local}, so that all must be a multiple of it")
    return ["--nproc-per-node", str(local), "--nnodes", str(workers // local), *rest]
