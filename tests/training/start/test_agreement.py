"""Processes that were started with other settings, versions, data or weights are named before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranks import Room
from tandem.checkpoints.detect import open_source
from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.files.sampled import sampled_digest
from tandem.launch.world import Communicator
from tandem.training.start import agreement
from tandem.training.start.agreement import agree_on_start, agree_on_weights
from toys import toy_config
from workspace import Workspace


def on_each(ranks: int, act: Callable[[Communicator, int], None]) -> list[tuple[str, ...]]:
    """The problems that each rank meets."""
    room = Room(ranks)

    def problems(rank: int) -> tuple[str, ...]:
        try:
            act(room.communicator(rank, per_machine=1), rank)
        except UserError as error:
            return error.problems
        return ()

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(problems, range(ranks)))


def of_settings(*settings: Settings) -> tuple[str, ...]:
    """The problems of ranks with these settings, which all of them have."""
    config = toy_config()

    def agree(communicator: Communicator, rank: int) -> None:
        agree_on_start(communicator, settings[rank], "torch", config, None)

    found = on_each(len(settings), agree)
    assert len(set(found)) == 1
    return found[0]


def test_settings_that_differ_are_named_with_their_ranks(workspace: Workspace) -> None:
    one, other = ({"train_iters": 20, "lr": 1e-3}, {"train_iters": 30, "lr": 2e-3})
    settings = [workspace.settings("torch", **values) for values in (one, other, other)]
    problems = of_settings(*settings)
    assert [problem.split()[0] for problem in problems] == ["--lr", "--train-iters"]
    assert "0.001 on rank 0, 0.002 on ranks 1 to 2" in problems[0]
    assert all("on every machine" in problem for problem in problems)


def test_machines_have_places_and_logs_of_their_own(workspace: Workspace, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace.root, tmp_path / "copy")
    settings = [
        workspace.settings("torch", save="a", node_rank=0, log_interval=1),
        workspace.settings(
            "torch", save="b", node_rank=1, workers=3, load=str(copy / "hf"), data_path=str(copy / "text_text_document")
        ),
    ]
    assert of_settings(*settings) == ()
    assert [problem.split()[0] for problem in of_settings(settings[0], workspace.settings("torch"))] == ["--save"]


@pytest.mark.parametrize("instructions", [False, True])
def test_other_data_under_the_same_flags_are_named(workspace: Workspace, instructions: bool, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace.root, tmp_path / "copy")
    name = "chat" if instructions else "text_text_document"
    file = copy / ("chat_packed_labels_document.bin" if instructions else "text_text_document.bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    problems = of_settings(
        *(
            workspace.settings("torch", instructions=instructions, data_path=str(root / name))
            for root in (workspace.root, copy)
        )
    )
    assert len(problems) == 1
    assert problems[0].startswith("--data-path, set 1 differs")
    assert "copy the same files" in problems[0]


def test_other_versions_are_named_unless_any_will_do(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"torch": "2.6.0", "mindspore": "2.9"}, {"torch": "2.7.0", "numpy": "1.26.4"}] * 2)
    monkeypatch.setattr(agreement, "versions", lambda: next(found))
    settings = [workspace.settings("torch")] * 2
    problems = of_settings(*settings)
    assert [problem.split(" differs")[0] for problem in problems] == ["the version of torch", "the version of numpy"]
    monkeypatch.setenv("TANDEM_ANY_VERSION", "1")
    assert of_settings(*settings) == ()


def test_other_weights_are_named(workspace: Workspace, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace.hf, tmp_path / "hf")
    engine: Any = SimpleNamespace(param_dtype="float32")
    folders = [workspace.hf, copy]

    def agree(communicator: Communicator, rank: int) -> None:
        agree_on_weights(communicator, engine, open_source(folders[rank]))

    assert on_each(2, agree) == [(), ()]
    file = next(copy.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    first, second = on_each(2, agree)
    assert first == second
    assert first[0].startswith("--load differs")


@pytest.mark.parametrize("size", [0, 10, 5000, 10_000_000])
def test_a_digest_of_samples_sees_the_ends_and_the_size(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    digests = {sampled_digest(path)}
    path.write_bytes(bytes(size + 1))
    digests.add(sampled_digest(path))
    path.write_bytes(bytes(size) + b"1")
    digests.add(sampled_digest(path))
    path.write_bytes(b"1" + bytes(size))
    digests.add(sampled_digest(path))
    assert len(digests) == (4 if size else 3)
