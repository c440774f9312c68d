"""Which checkpoints to keep: the newest ones, and those of certain iterations."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from tandem.checkpoints.folders import iteration_folder, saved_iterations
from tandem.files.publish import TEMPORARY

REMOVED = f"{TEMPORARY}removed-"  # prefix of a folder that is being removed, so that it is not read as a checkpoint


def superseded(iterations: Collection[int], newest: int, total_limit: int | None, retain_interval: int | None) -> set:
    """The saved iterations to remove after `newest` is saved.

    Iterations after `newest` are kept: they were saved before the run went back to an earlier iteration. As in
    Megatron, `retain_interval` alone keeps its multiples and the newest iteration.

    >>> sorted(superseded([10, 20, 30, 40], newest=40, total_limit=1, retain_interval=20))
    [10, 30]
    """
    if total_limit is None and retain_interval is None:
        return set()
    past = sorted(iteration for iteration in iterations if iteration <= newest)
    newest_ones = past[-(total_limit or 1) :]
    return {
        iteration
        for iteration in past
        if iteration not in newest_ones and not (retain_interval and iteration % retain_interval == 0)
    }


def remove_superseded(
    folder: Path, newest: int, total_limit: int | None, retain_interval: int | None, needed: Collection[int | None]
) -> None:
    """Remove superseded checkpoints except `needed`, and folders that a killed process did not finish removing."""
    for iteration in superseded(saved_iterations(folder), newest, total_limit, retain_interval).difference(needed):
        final = iteration_folder(folder, iteration)
        final.rename(folder / f"{REMOVED}{final.name}")
    for path in folder.glob(f"{REMOVED}*"):
        shutil.rmtree(path)
