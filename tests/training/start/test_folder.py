"""One run at a time in --save, and its machines as their disks are, whatever the flags say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from ranks import Room
from runs import assert_same_weights, run
from tandem.config.settings import CheckpointSettings
from tandem.errors import UserError
from tandem.files import lock
from tandem.files.lock import BusyError
from tandem.files.publish import LOCK
from tandem.launch.world import World
from tandem.training.logs.log import StepRecord
from tandem.training.start import folder as folders
from tandem.training.start.dry_run import dry_run
from tandem.training.start.folder import lock_folder, lock_other_folders, settle_storage
from workspace import Workspace


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    monkeypatch.setattr(folders, "SECONDS_TO_APPEAR", 0.1)


def settle(places: list[Path], **values: object) -> list[CheckpointSettings | UserError]:
    """What each rank of a job settles on. Two ranks are on a machine, whose `--save` is one of these places."""
    room = Room(2 * len(places))

    def of_rank(rank: int) -> CheckpointSettings | UserError:
        try:
            settings = CheckpointSettings(save=str(places[rank // 2]), **values)  # type: ignore[arg-type]
            return settle_storage(settings, room.communicator(rank, per_machine=2))
        except UserError as error:
            return error

    with ThreadPoolExecutor(2 * len(places)) as pool:
        return list(pool.map(of_rank, range(2 * len(places))))


def has_no_shared_storage(settled: list[CheckpointSettings | UserError]) -> list[bool]:
    assert all(isinstance(settings, CheckpointSettings) for settings in settled), settled
    return [settings.no_shared_storage for settings in settled if isinstance(settings, CheckpointSettings)]


@pytest.mark.parametrize("flag", [False, True])
def test_machines_that_share_the_folder_save_as_one(
    flag: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settled = settle([tmp_path / "run"] * 3, no_shared_storage=flag, export_hf_every=2)
    assert has_no_shared_storage(settled) == [False] * 6
    assert ("all 3 machines see the same" in capsys.readouterr().out) == flag
    assert not list((tmp_path / "run").iterdir())


def test_one_machine_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert has_no_shared_storage(settle([tmp_path / "run"], no_shared_storage=True)) == [False] * 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_machines_with_a_folder_each_need_the_flag(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    assert has_no_shared_storage(settle(places, no_shared_storage=True)) == [True] * 4
    for error in settle(places):
        assert isinstance(error, UserError)
        assert set(error.flags) == {"--save", "--no-shared-storage"}
    for error in settle(places, no_shared_storage=True, export_hf_every=2):
        assert isinstance(error, UserError)
        assert set(error.flags) == {"--export-hf-every", "--no-shared-storage"}


def test_machines_of_which_only_some_share_are_named(tmp_path: Path) -> None:
    for error in settle([tmp_path / "a", tmp_path / "b", tmp_path / "a"], no_shared_storage=True):
        assert isinstance(error, UserError)
        groups = str(error).split("; and these: ")
        assert "rank 0" in groups[0]
        assert "rank 4" in groups[0]
        assert "rank 2" in groups[1]


def test_a_folder_that_one_machine_cannot_write_is_an_error_of_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    errors = settle([tmp_path / "a", tmp_path / "file" / "run"], no_shared_storage=True)
    assert all("rank 2: cannot write to" in str(error) for error in errors)


def test_each_separate_disk_is_locked(tmp_path: Path) -> None:
    """Another job on the second machine's disk is an error of all ranks."""
    room = Room(2)

    def of_rank(rank: int) -> str:
        settings = CheckpointSettings(save=str(tmp_path / str(rank)), no_shared_storage=True)
        communicator = room.communicator(rank, per_machine=1)
        try:
            with ExitStack() as held:
                lock_folder(settings, communicator.world, held)
                lock_other_folders(settings, communicator, held)
                return " ".join(str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob(LOCK)))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        assert any(text == f"0/{LOCK} 1/{LOCK}" for text in pool.map(of_rank, range(2)))
    with lock.locked(tmp_path / "1", "it"), ThreadPoolExecutor(2) as pool:
        assert all(text.startswith("rank 1: --save") and "is in use by" in text for text in pool.map(of_rank, range(2)))


def test_two_runs_in_one_folder(workspace: Workspace, tmp_path: Path) -> None:
    """The second one is refused, and the first one ends as if nothing had happened."""
    values = {"train_iters": 4, "lr_warmup_iters": 0, "save_interval": 2}
    refused: list[str] = []

    def start_another(record: StepRecord) -> None:
        if record.iteration == 3:
            with pytest.raises(UserError, match="is in use by process") as caught:
                run(workspace, "torch", save=f"{tmp_path}/b/", **values)
            refused.extend(caught.value.flags)
            with pytest.raises(BusyError):
                dry_run(workspace.settings("torch", save=f"{tmp_path}/b", **values), 1)

    run(workspace, "torch", save=str(tmp_path / "a"), **values)
    run(workspace, "torch", start_another, save=str(tmp_path / "b"), **values)
    assert refused == ["--save"]
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / LOCK).exists()
    dry_run(workspace.settings("torch", save=f"{tmp_path}/b", **values), 1)


def test_a_start_that_is_refused_leaves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(workspace, "torch", save=str(tmp_path / "new" / "run"), lr=None)
    assert not list(tmp_path.iterdir())


def test_only_the_first_rank_locks_a_shared_folder(tmp_path: Path) -> None:
    with ExitStack() as held:
        for rank in (1, 0, 3):
            lock_folder(CheckpointSettings(save=str(tmp_path)), World(rank, 4, rank % 2), held)
        assert (tmp_path / LOCK).exists()
