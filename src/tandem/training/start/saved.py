"""Finds the newest whole checkpoint in a folder, and names what is damaged. Checks where a run may save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.checkpoints.detect import Facts, check_one_format, is_hugging_face, open_iteration, open_source
from tandem.checkpoints.folders import TRACKER, find_iteration, iteration_of, saved_iterations
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.native.format import INDEX
from tandem.errors import UserError
from tandem.training.logs.log import log_notice
from tandem.training.start.state import TrainerState, saved_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11


def check_place(save: str | Path) -> None:
    """Raise UserError when `save` holds something else than a run: checkpoints next to it would be taken for it."""
    folder = Path(save)
    if is_hugging_face(folder):
        raise UserError(
            f"--save {save} holds a Hugging Face model. With checkpoints next to it, nobody could tell which of the "
            f"two is meant: choose another folder for the run"
        )
    if (folder / INDEX).exists():
        raise UserError(f"--save {save} is one iteration of a checkpoint: choose the folder of a run, or a new one")


def find_newest(
    folder: str | Path,
    report: Callable[[str], None] = lambda _: None,
    *,
    weights_only: bool = False,
    **facts: Unpack[Facts],
) -> TensorSource:
    """The newest iteration of a checkpoint folder that can be used.

    Args:
        report: called with a text about each thing that is damaged.
        weights_only: the state of the training run is not needed.
        facts: as in `open_source`.

    Raises:
        UserError: no iteration can be used. The error is that of the newest one.
    """
    iterations = saved_iterations(folder)
    try:
        newest = find_iteration(folder)
    except UserError as error:
        if not iterations:
            raise
        report(f"{error}; taking the newest iteration that is there")
        newest = find_iteration(folder, iterations[0])
    number = iteration_of(newest)
    if number is None:  # a checkpoint of Megatron that is called "release" has no iteration number
        return open_iteration(folder, **facts)
    failure: UserError | None = None
    if not newest.exists():
        failure = UserError(
            f"{Path(folder) / TRACKER} names iteration {number}, and {newest.name} is missing: put it back, or remove "
            f"{TRACKER} to begin again"
        )
        report(f"{failure}; taking the iteration before it")
    for iteration in saved_iterations(folder):
        if iteration > number:
            continue  # not completely published
        try:
            source = open_iteration(folder, iteration, **facts)
            if not weights_only:
                _check_documents(source)
            return source
        except UserError as error:
            failure = failure or error
            report(f"iteration {iteration} cannot be used: {error}; taking the one before it")
    assert failure is not None, "an iteration was opened, or there is a reason why not"
    raise failure


def _check_documents(source: TensorSource) -> None:
    """Raise UserError when what a training run stored with the weights is damaged."""
    TrainerState.from_source(source)
    saved_settings(source)


def open_initial(folder: str, iteration: int | None, *, weights_only: bool, **facts: Unpack[Facts]) -> TensorSource:
    """Open the weights of `--load`. In the folder of a run, damaged iterations are skipped if `iteration` is None.

    Args:
        weights_only, facts: as in `find_newest`.
    """
    if iteration is not None or not saved_iterations(folder):
        return open_source(folder, iteration, **facts)
    check_one_format(folder)
    return find_newest(folder, log_notice, weights_only=weights_only, **facts)
