"""Saving: in the background, how many checkpoints stay, exports next to them, and what fails."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import numpy as np
import pytest

from runs import assert_same_weights, run
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import saved_iterations
from tandem.checkpoints.formats.safetensors import SafetensorsWriter
from tandem.checkpoints.native.rank_sink import NativeRankSink
from tandem.checkpoints.native.source import NativeSource
from tandem.errors import UserError
from tandem.launch.member import JOB
from tandem.models.tensors import tensor_table
from tandem.training.logs.events import read_events
from tandem.training.logs.log import StepRecord
from tandem.training.saving import writer as saving
from tandem.training.saving.retention import remove_superseded, superseded
from workspace import Workspace


def test_saving_in_the_background_gives_the_same_files(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """Every save and every byte is as without --async-save, and training is not disturbed."""
    common = {"save_interval": 2, "train_iters": 7}
    one = run(workspace, framework, save=str(tmp_path / "a"), **common)
    other = run(workspace, framework, save=str(tmp_path / "b"), async_save=True, **common)
    assert one == other
    for iteration in (2, 4, 6, 7):
        files = [tmp_path / side / f"iter_{iteration:07d}" / "mp_rank_00" for side in "ab"]
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    assert [event["iteration"] for event in read_events(tmp_path / "b") if event["event"] == "saved"] == [2, 4, 6, 7]


def test_training_goes_on_while_a_thread_writes(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is written is the state of the save, though steps are taken meanwhile; the next save waits for it."""
    gate, finish = threading.Event(), NativeRankSink.finish
    visible = []

    def slowly(sink: NativeRankSink) -> None:
        assert gate.wait(30)
        finish(sink)

    def act(record: StepRecord) -> None:
        visible.append(saved_iterations(tmp_path / "b"))
        if record.iteration == 4:  # which ends with the next save
            threading.Timer(0.5, gate.set).start()

    common = {"save_interval": 2, "train_iters": 6}
    run(workspace, "torch", save=str(tmp_path / "a"), **common)
    monkeypatch.setattr(NativeRankSink, "finish", slowly)
    run(workspace, "torch", act, save=str(tmp_path / "b"), async_save=True, **common)
    assert visible[:4] == [[]] * 4
    assert 2 in visible[4]
    for iteration in (2, 4, 6):
        assert_same_weights(tmp_path / "a", tmp_path / "b", iteration)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    workspace: Workspace, framework: str, async_save: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message names the folder, nothing half-written stays, and the run goes on when there is room."""
    common = {"save": str(tmp_path / "b"), "save_interval": 4, "train_iters": 12, "async_save": async_save}
    unbroken = run(workspace, framework, **{**common, "save": str(tmp_path / "a")})
    write, full = SafetensorsWriter.write, []

    def write_unless_full(writer: SafetensorsWriter, name: str, tensor: np.ndarray) -> bool:
        if "iter_0000008" in str(writer.path) and name.startswith("exp_avg"):
            full.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", write_unless_full)
    with pytest.raises(UserError, match=r"iter_0000008 was not saved: rank 0: .*No space left on device"):
        run(workspace, framework, **common)
    monkeypatch.undo()
    assert full
    assert [path.name for path in sorted((tmp_path / "b").iterdir()) if path.is_dir()] == ["iter_0000004"]
    assert run(workspace, framework, **common) == unbroken[4:]
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_too_little_room_is_known_before_writing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs .* MB and the disk has 0 MB free"):
        run(workspace, "torch", save=str(tmp_path), train_iters=1, lr_warmup_iters=0)
    assert saved_iterations(tmp_path) == []


@pytest.mark.parametrize(
    ("limit", "interval", "removed"),
    [
        (None, None, set()),
        (1, None, {2, 4, 6, 8}),
        (3, None, {2, 4}),
        (9, None, set()),
        (None, 4, {2, 6}),
        (2, 4, {2, 6}),
        (1, 20, {2, 4, 6, 8}),
    ],
)
def test_what_is_superseded(limit: int | None, interval: int | None, removed: set[int]) -> None:
    """The newest ones and the multiples stay; 12 belongs to a branch that was left."""
    assert superseded([12, 10, 8, 6, 4, 2], 10, limit, interval) == removed


def test_what_is_needed_is_not_removed_and_half_removed_folders_go(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        (tmp_path / f"iter_{iteration:07d}" / "x").mkdir(parents=True)
    (tmp_path / ".incomplete-removed-iter_0000009").mkdir()
    remove_superseded(tmp_path, 3, 1, None, needed={1, None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000003"]


@pytest.mark.parametrize("async_save", [False, True])
def test_old_checkpoints_are_removed_but_not_the_one_resumed_from(
    workspace: Workspace, async_save: bool, tmp_path: Path
) -> None:
    common = {"save": str(tmp_path), "save_interval": 1, "async_save": async_save, "train_iters": 9}
    run(workspace, "torch", **common, exit_interval=3, save_total_limit=2)
    assert saved_iterations(tmp_path) == [3, 2]
    run(workspace, "torch", **common, exit_interval=6, save_total_limit=1, save_retain_interval=5)
    assert saved_iterations(tmp_path) == [6, 5, 3]
    run(workspace, "torch", **common, save_total_limit=1)
    assert saved_iterations(tmp_path) == [9, 6]


def test_an_old_checkpoint_that_cannot_be_removed_is_told(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(saving, "remove_superseded", refuse)
    losses = run(workspace, "torch", save=str(tmp_path), save_interval=2, train_iters=4, save_total_limit=1)
    assert len(losses) == 4
    assert "an old checkpoint cannot be removed" in capsys.readouterr().err


def test_hugging_face_folders_next_to_the_checkpoints(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Written by a process that leaves no trace in the job's own folder, as a rank would."""
    job = tmp_path_factory.mktemp("job")
    monkeypatch.setenv(JOB, str(job))
    common = {"save_interval": 2, "save_total_limit": 1, "train_iters": 6}
    run(workspace, "torch", save=str(tmp_path), export_hf_every=4, instructions=True, **common)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["iter_0000004"]
    exported = open_source(tmp_path / "hf" / "iter_0000004")
    run(workspace, "torch", save=str(tmp_path / "again"), instructions=True, **{**common, "save_total_limit": None})
    expected = NativeSource(tmp_path / "again", 4)
    assert all(np.array_equal(exported.read(name), expected.read(name)) for name in tensor_table(expected.config))
    assert [event["iteration"] for event in read_events(tmp_path) if event["event"] == "exported"] == [4]
    assert not list(job.iterdir())


def test_an_export_that_fails_is_told_and_training_goes_on(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").write_text("in the way")
    run(workspace, "torch", save=str(tmp_path), export_hf_every=1, train_iters=2, lr_warmup_iters=0, save_interval=1)
    assert "iteration 1 was not exported" in capsys.readouterr().err
    assert [event["iteration"] for event in read_events(tmp_path) if event["event"] == "export failed"] == [1, 2]
