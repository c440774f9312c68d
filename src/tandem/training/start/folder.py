"""The `--save` folder of a job: one job at a time uses it, and its machines see one folder, or each its own."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tandem.config.settings import CheckpointSettings
from tandem.errors import UserError
from tandem.files.lock import locked
from tandem.files.publish import write_text_atomically
from tandem.launch.world import Communicator, World
from tandem.training.logs.log import log_notice

TOKEN = ".seen-"  # prefix of a file that a machine writes for the others to see
SECONDS_TO_APPEAR = 2.0  # a file may take as long until another machine sees it


def lock_folder(checkpoint: CheckpointSettings, world: World, held: ExitStack) -> None:
    """Keep other runs out of `--save` while `held` is open. This comes before the folder is read for the first time.

    Raises:
        UserError: another run uses the folder, or it cannot be written to.
    """
    if checkpoint.save is not None and world.rank == 0:
        held.enter_context(locked(checkpoint.save, f"--save {checkpoint.save}"))


def settle_storage(checkpoint: CheckpointSettings, communicator: Communicator) -> CheckpointSettings:
    """The settings with `no_shared_storage` as the disks are. Collective.

    Scripts of MindSpeed-LLM always give `--no-shared-storage`, also where all machines share a disk.

    Raises:
        UserError: on every rank: the flag is missing on separate disks, some machines share a disk and others do not,
            or the folder cannot be written to.
    """
    if checkpoint.save is None:
        return checkpoint
    seen = _who_sees_whom(Path(checkpoint.save), communicator)
    machines = set(seen)
    if all(others == machines for others in seen.values()):
        if checkpoint.no_shared_storage and len(machines) > 1:
            log_notice(
                f"--no-shared-storage: all {len(machines)} machines see the same {checkpoint.save}, so checkpoints are "
                f"saved as without it"
            )
        return replace(checkpoint, no_shared_storage=False)
    if any(others != {machine} for machine, others in seen.items()):
        raise UserError(f"--save {checkpoint.save}: {_in_words(seen)}. Give all machines one disk, or each its own")
    if not checkpoint.no_shared_storage:
        raise UserError(
            f"--save {checkpoint.save} is another folder on each of the {len(machines)} machines: give a folder on a "
            f"disk that they share, or --no-shared-storage, so that each keeps the parts of its ranks"
        )
    if checkpoint.export_hf_every:
        raise UserError(
            "--export-hf-every and --no-shared-storage: give one of them. On separate disks no machine has the whole "
            "checkpoint: copy its parts into one folder, then run `tandem export`"
        )
    return checkpoint


def lock_other_folders(checkpoint: CheckpointSettings, communicator: Communicator, held: ExitStack) -> None:
    """Lock the `--save` folder on each machine with a disk of its own, except the first rank's. Collective.

    Raises:
        UserError: on every rank, when another process holds a lock.
    """
    world, save = communicator.world, checkpoint.save
    failure: UserError | None = None
    if save is not None and checkpoint.no_shared_storage and world.rank and not world.local_rank:
        try:
            held.enter_context(locked(save, f"--save {save}"))
        except UserError as error:
            failure = error
    _raise_together(failure, communicator)


def _who_sees_whom(folder: Path, communicator: Communicator) -> dict[str, set[str]]:
    """For each machine of the job, which machines' files it sees in `folder`. Collective."""
    world = communicator.world
    machine = f"{platform.node()} (rank {world.rank})"
    leads = world.local_rank == 0
    if communicator.all_gather(leads).count(True) < 2:
        return {machine: {machine}}
    token = folder / f"{TOKEN}{uuid.uuid4().hex}"  # a name that no machine has looked for before
    failure: UserError | None = None
    written = False
    try:
        if leads:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_text_atomically(token, machine)
                written = True
            except OSError as error:
                failure = UserError(f"cannot write to {folder}: {error.strerror}")
        _raise_together(failure, communicator)
        tokens = [entry for entry in communicator.all_gather([machine, token.name] if leads else None) if entry]
        seen = [other for other, name in tokens if _appears(folder / name)] if leads else None
        reports = [entry for entry in communicator.all_gather([machine, seen] if leads else None) if entry]
    finally:
        if written:
            token.unlink()
    return {one: set(others) for one, others in reports}


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(SECONDS_TO_APPEAR / 20)
    return True


def _raise_together(failure: UserError | None, communicator: Communicator) -> None:
    """Raise UserError on every rank when one has failed. Collective."""
    texts = communicator.all_gather(str(failure) if failure else None)
    if failed := [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]:
        raise UserError("; ".join(failed)) from failure


def _in_words(seen: Mapping[str, set[str]]) -> str:
    """Which machines share a disk, one group after the other."""
    groups = dict.fromkeys(", ".join(sorted(others)) for others in seen.values())
    return "these machines see the same folder: " + "; and these: ".join(groups)
