"""Where a run goes on: from its own newest whole checkpoint, or from what `--load` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tandem.backends.interface import Engine
from tandem.checkpoints.detect import open_iteration, open_source
from tandem.checkpoints.folders import TRACKER, find_iteration, iteration_of, saved_iterations
from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import CheckpointSettings, DataSettings, plain_values
from tandem.data.datasets.blend import plain_paths
from tandem.data.preprocess.cache import without_keys
from tandem.errors import UserError
from tandem.launch.world import Communicator
from tandem.training.logs.log import log_notice
from tandem.training.progress import Progress
from tandem.training.start.state import SETTINGS_FILE, check_optimizer, restore

# What makes a run the same one: where it began, and what it is trained on, which is known when raw files have become
# their prefixes.
ORIGIN = ("load", "init")
DATA = ("data_path", "is_instruction_dataset")
FIRST_START = ("finetune", "no_load_optim", "no_load_rng")  # what these ask for is done once
# Settings that only say where things are, and may differ between two starts of a run.
PLACES = {"load", "save", "init", "ckpt_step", *FIRST_START}


def continued(checkpoint: CheckpointSettings) -> CheckpointSettings:
    """The settings to load by. When `--save` holds a checkpoint of this very run, the run goes on from there, whatever
    its first start was told to load: so the same command, started again, continues.

    Raises:
        UserError: `--save` holds a checkpoint of another run.
    """
    if checkpoint.save is None or not (Path(checkpoint.save) / TRACKER).exists():
        return checkpoint
    if _loads_where_it_saves(checkpoint):
        return _without_what_was_done(checkpoint, checkpoint.save)
    saved = saved_settings(find_newest(checkpoint.save))
    if saved is None:
        raise UserError(
            f"--save {checkpoint.save} holds a converted checkpoint: choose another folder for the run's own"
        )
    before = saved.get("checkpoint", {})
    _check_same(ORIGIN, before, plain_values(checkpoint), checkpoint.save)
    _check_step(before, checkpoint)
    first_start: dict[str, Any] = dict.fromkeys(FIRST_START, False)
    return replace(checkpoint, load=checkpoint.save, init=None, ckpt_step=None, **first_start)


def check_same_data(data: DataSettings, checkpoint: CheckpointSettings, loading: CheckpointSettings) -> None:
    """Raise UserError when the run goes on (`loading` is what `continued` gave) that was trained on other data."""
    save = checkpoint.save
    if save is not None and loading.load == save and not _loads_where_it_saves(checkpoint):
        saved = saved_settings(find_newest(save)) or {}
        _check_same(DATA, saved.get("data", {}), plain_values(data), save)


def _check_same(names: Sequence[str], before: dict[str, Any], now: dict[str, Any], save: str) -> None:
    """Raise UserError when values of a group differ from those that the run in `save` had before."""
    for name in names:
        was, new = before.get(name), now[name]
        if name == "data_path" and was is not None:
            was = list(plain_paths(was))
        if was == new or (name == "load" and was == save):
            continue
        changed = f"whose {name} was {was}; here it is {new}"
        if name == "data_path" and was is not None and without_keys(was) == without_keys(new):
            changed = "whose raw data, or the flags that say how they are read, were others: they have changed since"
        raise UserError(
            f"--save {save} holds a checkpoint of another run, {changed}. "
            f"Choose another folder, or resume that run with --load {save}"
        )


def _check_step(before: dict[str, Any], now: CheckpointSettings) -> None:
    """Raise UserError for an iteration of `--load` that the first start did not take: it would be passed over, and who
    gives it now wants to go back."""
    if now.ckpt_step is not None and before.get("load") == now.load and before.get("ckpt_step") != now.ckpt_step:
        raise UserError(
            f"--ckpt-step {now.ckpt_step} is an iteration of --load {now.load}, but --save {now.save} holds this run, "
            f"which goes on from its newest. To go back to an earlier one, give --load {now.save} --ckpt-step "
            f"{now.ckpt_step}"
        )


def _without_what_was_done(checkpoint: CheckpointSettings, save: str) -> CheckpointSettings:
    """For a run that loads and saves in one folder: without those flags for the first start that the newest checkpoint
    there was already made with."""
    given = [name for name in FIRST_START if getattr(checkpoint, name)]
    if not given:
        return checkpoint
    before = (saved_settings(find_newest(save)) or {}).get("checkpoint", {})
    if before.get("load") != checkpoint.load:
        return checkpoint
    done: dict[str, Any] = {name: False for name in given if before.get(name)}
    return replace(checkpoint, **done)


def find_newest(folder: str | Path, report: Callable[[str], None] = lambda _: None) -> TensorSource:
    """The newest iteration of a checkpoint folder that can be opened. Of those that cannot, `report` is told.

    Raises:
        UserError: none can; the newest one's error.
    """
    newest = find_iteration(folder)
    number = iteration_of(newest)
    if number is None:  # a release has no iterations
        return open_iteration(folder)
    failure: UserError | None = None
    for iteration in saved_iterations(folder):
        if iteration > number:
            continue  # not published to its end
        try:
            return open_iteration(folder, iteration)
        except UserError as error:
            failure = failure or error
            report(f"iteration {iteration} cannot be used: {error}; taking the one before it")
    raise failure or UserError(f"{folder} names iteration {newest.name}, which is not there")


def open_initial(folder: str, iteration: int | None) -> TensorSource:
    """`open_source`, but of a run's folder the newest iteration that is whole, when none is asked for."""
    try:
        return open_source(folder, iteration)
    except UserError:
        if iteration is not None or len(saved_iterations(folder)) < 2:
            raise
    return find_newest(folder, log_notice)


def restore_newest(
    engine: Engine, source: TensorSource, checkpoint: CheckpointSettings, communicator: Communicator
) -> tuple[TensorSource, Progress]:
    """Load from `source`; when a rank finds it damaged, all ranks load the iteration before it.

    Returns:
        What was loaded, and the progress to continue from.

    Raises:
        UserError: on every rank, when there is no whole one.
    """
    source = agree_on_iteration(source, communicator)
    check_optimizer(source, checkpoint)
    while True:
        failure: UserError | None = None
        try:
            progress = restore(engine, source, checkpoint)
        except UserError as error:
            failure = error
        texts = communicator.all_gather(str(failure) if failure else None)
        broken = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
        if not broken:
            return source, progress
        older = source.earlier() if checkpoint.ckpt_step is None else None
        if older is None:
            raise failure or UserError("; ".join(broken))
        log_notice(f"{source.location} cannot be used: {'; '.join(broken)}; taking the iteration before it")
        source = older


def agree_on_iteration(source: TensorSource, communicator: Communicator) -> TensorSource:
    """The newest iteration that every rank has: without shared storage, a kill may leave machines with different ones.

    Raises:
        UserError: on every rank, when there is none.
    """
    current: TensorSource | None = source
    while True:
        iteration = current.iteration if current is not None else None
        ranks = communicator.all_gather([iteration, current is not None])
        if all(rank == ranks[0] for rank in ranks) and current is not None:
            return current
        numbers = [number for number, _ in ranks]
        if None in numbers:
            absent = ", ".join(str(rank) for rank, number in enumerate(numbers) if number is None)
            raise UserError(
                f"ranks {absent} hold no checkpoint of the run that the other ranks go on with: copy the newest "
                f"iteration and the tracker file to their machines, or remove both everywhere to begin again"
            )
        if iteration != min(numbers):
            assert current is not None, "a rank without an iteration has ended the search"
            current = current.earlier()


def saved_settings(source: TensorSource) -> dict[str, dict[str, Any]] | None:
    """The settings that a trainer stored with a checkpoint; None for any other source."""
    text = source.document(SETTINGS_FILE)
    settings: dict[str, dict[str, Any]] | None = None if text is None else yaml.safe_load(text)
    return settings


def changes(source: TensorSource, now: dict[str, dict[str, Any]]) -> list[str]:
    """A table of which settings differ from those that the checkpoint was saved with; those of `now` apply."""
    saved = saved_settings(source)
    if saved is None:
        return []
    rows = [
        (name, str(saved.get(group, {}).get(name)), str(value))
        for group, values in now.items()
        for name, value in values.items()
        if name not in PLACES and name in saved.get(group, {}) and saved[group][name] != value
    ]
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [("setting", "was", "is"), *rows]) for column in range(2)]
    return [f"{name:<{widths[0]}}  {was:<{widths[1]}}  {new}" for name, was, new in [("setting", "was", "is"), *rows]]


def _loads_where_it_saves(checkpoint: CheckpointSettings) -> bool:
    load, save = checkpoint.load, checkpoint.save
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()
