"""Resumes a run from its newest complete checkpoint, or starts it from `--load`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.backends.interface import Engine
from tandem.checkpoints.folders import holds_iterations
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.native.source import NativeSource
from tandem.config.settings import CheckpointSettings, DataSettings
from tandem.data.datasets.mixture import same_words
from tandem.data.preprocess.cache import without_keys
from tandem.errors import UserError
from tandem.files.places import resolved, same_place
from tandem.launch.world import Communicator
from tandem.training.logs.log import log_notice
from tandem.training.progress import Progress
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.saved import find_newest
from tandem.training.start.state import (
    TrainerState,
    check_optimizer,
    has_optimizer,
    restore,
    saved_settings,
    state_to_continue,
)

FIRST_START = ("finetune", "no_load_optim")  # these only affect the first start of a run


def continued(checkpoint: CheckpointSettings) -> CheckpointSettings:
    """The settings to load with. If `--save` contains a checkpoint of this run, it is loaded instead of `--load`.

    So the same command, started again, continues the run.

    Raises:
        UserError: `--save` contains checkpoints of another run, or only damaged ones.
    """
    save = checkpoint.save
    if save is None or not holds_iterations(save):
        return checkpoint
    if _loads_where_it_saves(checkpoint):
        return _without_first_start(checkpoint, save)
    newest = find_newest(save, adapters_alone=True)
    if TrainerState.from_source(newest) is None:
        raise UserError(f"--save {save} contains a converted checkpoint: choose another folder for this run")
    _check_origin(origin_of_saved(newest), checkpoint, names_base=_names_base(newest, checkpoint))
    # A run that saves no optimizer goes on without one each time.
    without_optimizer = checkpoint.no_load_optim and not has_optimizer(newest)
    return replace(checkpoint, load=save, init=None, ckpt_step=None, finetune=False, no_load_optim=without_optimizer)


def check_new_run(state: TrainerState | None, save: str | None) -> None:
    """Raise UserError when a run that begins at iteration 0 would write over the checkpoints in `--save`."""
    if state is None and save is not None and holds_iterations(save):
        raise UserError(
            f"--save {save} contains checkpoints, and this run begins at iteration 0: it would replace them. Choose "
            f"another folder for --save"
        )


def origin_of(checkpoint: CheckpointSettings) -> dict[str, Any]:
    """What a run starts from, as its checkpoints record it: `load` as given, its place, `init` and `ckpt_step`."""
    load = checkpoint.load
    place = None if load is None else resolved(load)
    return {"load": load, "place": place, "init": checkpoint.init, "ckpt_step": checkpoint.ckpt_step}


def origin_of_saved(source: TensorSource) -> dict[str, Any]:
    """What the run that wrote a checkpoint first started from.

    Older checkpoints have the settings of their last start instead.
    """
    state = TrainerState.from_source(source)
    if state is not None and state.origin:
        return state.origin
    settings = (saved_settings(source) or {}).get("checkpoint", {})
    return {name: settings.get(name) for name in ("load", "init", "ckpt_step")}


def check_same_data(data: DataSettings, checkpoint: CheckpointSettings, loading: CheckpointSettings) -> None:
    """Raise UserError when the run that is resumed was trained on other data.

    Args:
        loading: the result of `continued`.
    """
    save = checkpoint.save
    if save is None or loading.load != save or _loads_where_it_saves(checkpoint):
        return
    state = TrainerState.from_source(find_newest(save, adapters_alone=True))
    before: dict[str, Any] = state.data if state else {}
    old, new = before.get("data_path"), list(data.data_path)
    places: dict[str, str] = before.get("mixture", {}).get("places", {})
    if old is not None and not same_words(new, old, places):
        if old != new and without_keys(old) == without_keys(new):
            raise _another_run(save, "since its raw data, or the flags for reading them, have changed")
        if old == new:  # the same words, in another folder
            old = [places.get(word, word) for word in old]
            new = [resolved(word) if word in places else word for word in new]
        raise _another_run(save, f"with data_path {' '.join(old)}; here it is {' '.join(new)}")
    kind, kind_now = state.kind_of_data if state else None, kind_to_train(data).name
    if kind not in (None, kind_now):
        raise _another_run(save, f"on {kind}; here it is {kind_now}")


def _names_base(newest: TensorSource, now: CheckpointSettings) -> bool:
    """Whether `--load` names the weights that the adapters in `--save` belong to, or their new place if they are gone.

    They are compared with the hash that the run recorded when they are first read.
    """
    record = newest.record if isinstance(newest, NativeSource) else None
    if record is None or now.load is None:
        return False
    if same_place(now.load, record.folder):
        return True
    if Path(record.folder).exists():
        return False
    log_notice(f"{record.folder}, the weights of the adapters in {now.save}, is gone: --load {now.load} is taken")
    return True


def _check_origin(origin: dict[str, Any], now: CheckpointSettings, *, names_base: bool) -> None:
    """Raise UserError when a command starts from something else than the run in `--save` did.

    Also for a new `--ckpt-step`: the run would ignore it and continue from its newest checkpoint.

    Args:
        names_base: `--load` names the weights of the run's adapters, wherever the run began.
    """
    save, old, new = now.save, origin.get("load"), now.load
    assert save is not None
    if origin.get("init") != now.init:
        raise _another_run(save, f"with init {origin.get('init')}; here it is {now.init}")
    # A command with --load SAVE continued the run; checkpoints that record no origin then have only that.
    if old is not None and "place" not in origin and same_place(save, old):
        log_notice(f"--load {new}: the checkpoints in {save} do not record what their run started from")
        return
    same = old == new if old is None or new is None else same_place(new, old, origin.get("place"))
    if not same and not names_base:
        if old == new and new is not None:  # the same words, in another folder
            old, new = origin["place"], resolved(new)
        raise _another_run(save, f"with load {old}; here it is {new}")
    if now.ckpt_step is not None and origin.get("ckpt_step") != now.ckpt_step:
        raise UserError(
            f"--ckpt-step {now.ckpt_step} is an iteration of --load {now.load}, but the run in --save {save} "
            f"continues from its newest iteration. To go back to an earlier one, give --load {save} --ckpt-step "
            f"{now.ckpt_step}"
        )


def _another_run(save: str, difference: str) -> UserError:
    return UserError(
        f"--save {save} contains a checkpoint of another run, {difference}. "
        f"Choose another folder, or resume that run with --load {save}"
    )


def _without_first_start(checkpoint: CheckpointSettings, save: str) -> CheckpointSettings:
    """Turn off flags for the first start, if the newest checkpoint was already made with them.

    This is for a run that loads from and saves to the same folder.
    """
    given = [name for name in FIRST_START if getattr(checkpoint, name)]
    if not given:
        return checkpoint
    newest = find_newest(save, adapters_alone=True)
    before = (saved_settings(newest) or {}).get("checkpoint", {})
    if before.get("load") is None or not same_place(save, before["load"]):
        return checkpoint
    done: dict[str, Any] = {name: False for name in given if before.get(name)}
    if not has_optimizer(newest):
        done.pop("no_load_optim", None)
    return replace(checkpoint, **done)


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
    goes_on = state_to_continue(source, checkpoint) is not None
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
        if older is None or (goes_on and state_to_continue(older, checkpoint) is None):
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


def _loads_where_it_saves(checkpoint: CheckpointSettings) -> bool:
    load, save = checkpoint.load, checkpoint.save
    return load is not None and save is not None and same_place(load, save)
