"""Which checkpoints stay: the newest, and every so many iterations."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from tandem.checkpoints.folders import iteration_folder, saved_iterations
from tandem.files.publish import TEMPORARY

REMOVED = f"{TEMPORARY}removed-"  # a folder on its way out: no reader takes it for a checkpoint


def superseded(iterations: Collection[int], newest: int, total_limit: int | None, retain_interval: int | None) -> set:
    """Of the saved `iterations`, those to be removed once `newest` is whole.

    Later ones than `newest` are of a branch that was left, and not touched. As in Megatron, `retain_interval` alone
    keeps the newest and its multiples.
    """
    if total_limit is None and retain_interval is None:
        return set()
    past = sorted(iteration for iteration in iterations if iteration <= newest)
    kept = past[-(total_limit or 1) :]
    return {
        iteration
        for iteration in past
        if iteration not in kept and not (retain_interval and iteration % retain_interval == 0)
    }


def remove_superseded(
    folder: Path, newest: int, total_limit: int | None, retain_interval: int | None, needed: Collection[int | None]
) -> None:
    """Remove them, but for the `needed`, and what a killed process had begun to remove."""
    for iteration in superseded(saved_iterations(folder), newest, total_limit, retain_interval).difference(needed):
        final = iteration_folder(folder, iteration)
        final.rename(folder / f"{REMOVED}{final.name}")
    for path in folder.glob(f"{REMOVED}*"):
        shutil.rmtree(path)
