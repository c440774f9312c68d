"""Resumes a run from its newest complete checkpoint, or starts it from `--load`."""

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

# A command continues the run in --save if these settings are the same. `DATA` is compared after preprocessing, when
# raw files have been replaced by their prefixes.
ORIGIN = ("load", "init")
DATA = ("data_path", "is_instruction_dataset")
FIRST_START = ("finetune", "no_load_optim", "no_load_rng")  # these only affect the first start of a run
# Settings for places, which may differ between two starts of a run.
PLACES = {"load", "save", "init", "ckpt_step", *FIRST_START}


def continued(checkpoint: CheckpointSettings) -> CheckpointSettings:
    """The settings to load with. If `--save` contains a checkpoint of this run, it is loaded instead of `--load`.

    So the same command, started again, continues the run.

    Raises:
        UserError: `--save` contains a checkpoint of another run.
    """
    if checkpoint.save is None or not (Path(checkpoint.save) / TRACKER).exists():
        return checkpoint
    if _loads_where_it_saves(checkpoint):
        return _without_first_start(checkpoint, checkpoint.save)
    saved = saved_settings(find_newest(checkpoint.save))
    if saved is None:
        raise UserError(f"--save {checkpoint.save} contains a converted checkpoint: choose another folder for this run")
    before = saved.get("checkpoint", {})
    _check_same(ORIGIN, before, plain_values(checkpoint), checkpoint.save)
    _check_step(before, checkpoint)
    first_start: dict[str, Any] = dict.fromkeys(FIRST_START, False)
    return replace(checkpoint, load=checkpoint.save, init=None, ckpt_step=None, **first_start)


def check_same_data(data: DataSettings, checkpoint: CheckpointSettings, loading: CheckpointSettings) -> None:
    """Raise UserError when the run that is resumed was trained on other data.

    Args:
        loading: the result of `continued`.
    """
    save = checkpoint.save
    if save is not None and loading.load == save and not _loads_where_it_saves(checkpoint):
        saved = saved_settings(find_newest(save)) or {}
        _check_same(DATA, saved.get("data", {}), plain_values(data), save)


def _check_same(names: Sequence[str], before: dict[str, Any], now: dict[str, Any], save: str) -> None:
    """Raise UserError when settings differ from those of the run in `save`."""
    for name in names:
        old, new = before.get(name), now[name]
        if name == "data_path" and old is not None:
            old = list(plain_paths(old))
        if old == new or (name == "load" and old == save):
            continue
        difference = f"with {name} {old}; here it is {new}"
        if name == "data_path" and old is not None and without_keys(old) == without_keys(new):
            difference = "since its raw data, or the flags for reading them, have changed"
        raise UserError(
            f"--save {save} contains a checkpoint of another run, {difference}. "
            f"Choose another folder, or resume that run with --load {save}"
        )


def _check_step(before: dict[str, Any], now: CheckpointSettings) -> None:
    """Raise UserError for a new --ckpt-step: the run would ignore it and continue from its newest checkpoint."""
    if now.ckpt_step is not None and before.get("load") == now.load and before.get("ckpt_step") != now.ckpt_step:
        raise UserError(
            f"--ckpt-step {now.ckpt_step} is an iteration of --load {now.load}, but the run in --save {now.save} "
            f"continues from its newest iteration. To go back to an earlier one, give --load {now.save} --ckpt-step "
            f"{now.ckpt_step}"
        )


def _without_first_start(checkpoint: CheckpointSettings, save: str) -> CheckpointSettings:
    """Turn off flags for the first start, if the newest checkpoint was already made with them.

    This is for a run that loads from and saves to the same folder.
    """
    given = [name for name in FIRST_START if getattr(checkpoint, name)]
    if not given:
        return checkpoint
    before = (saved_settings(find_newest(save)) or {}).get("checkpoint", {})
    if before.get("load") != checkpoint.load:
        return checkpoint
    done: dict[str, Any] = {name: False for name in given if before.get(name)}
    return replace(checkpoint, **done)


def find_newest(folder: str | Path, report: Callable[[str], None] = lambda _: None) -> TensorSource:
    """The newest iteration of a checkpoint folder that can be opened.

    Args:
        report: called with a text about each iteration that cannot be opened.

    Raises:
        UserError: no iteration can be opened. The error is that of the newest one.
    """
    newest = find_iteration(folder)
    number = iteration_of(newest)
    if number is None:  # a checkpoint of Megatron that is called "release" has no iteration number
        return open_iteration(folder)
    failure: UserError | None = None
    for iteration in saved_iterations(folder):
        if iteration > number:
            continue  # not completely published
        try:
            return open_iteration(folder, iteration)
        except UserError as error:
            failure = failure or error
            report(f"iteration {iteration} cannot be used: {error}; taking the one before it")
    raise failure or UserError(f"{folder} names iteration {newest.name}, but that folder is missing")


def open_initial(folder: str, iteration: int | None) -> TensorSource:
    """Open the weights of `--load`. In the folder of a run, damaged iterations are skipped if `iteration` is None."""
    try:
        return open_source(folder, iteration)
    except UserError:
        if iteration is not None or len(saved_iterations(folder)) < 2:
            raise
    return find_newest(folder, log_notice)


def restore_newest(
    engine: Engine, source: TensorSource, checkpoint: CheckpointSettings, communicator: Communicator
) -> tuple[TensorSource, Progress]:
    """Load from `source`. If it is damaged on any rank, all ranks load the iteration before it.

    Returns:
        The source that was loaded, and the progress to continue from.

    Raises:
        UserError: on every rank, when no complete iteration is left.
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
    """The newest iteration that every rank has.

    Without shared storage, machines may have different iterations after a job was killed.

    Raises:
        UserError: on every rank, when there is no such iteration.
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
                f"ranks {absent} have no checkpoint of the run that the other ranks continue: copy the newest "
                f"iteration and the tracker file to their machines, or remove both everywhere to start again"
            )
        if iteration != min(numbers):
            assert current is not None, "the search ends when a rank has no iteration"
            current = current.earlier()


def saved_settings(source: TensorSource) -> dict[str, dict[str, Any]] | None:
    """The settings that a training run stored with a checkpoint; None for any other source."""
    text = source.document(SETTINGS_FILE)
    settings: dict[str, dict[str, Any]] | None = None if text is None else yaml.safe_load(text)
    return settings


def changes(source: TensorSource, now: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table of settings that have changed since the checkpoint. The settings in `now` are used."""
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
