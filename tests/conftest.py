"""Toy models and paths that several tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from environments import SHARED
from frameworks import require_framework
from slow_parts import PARTS, misplaced, parts_of
from tandem.logs import printed
from workspace import Workspace, make_workspace

# Toy products gain nothing from threads, and several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MISPLACED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=list(PARTS), help="only this part of the slow tests (tests/slow_parts.py)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[MISPLACED] = misplaced(items)  # here, because -m "not slow" takes slow tests away next
    part = config.getoption("--part")
    if part is not None:
        config.hook.pytest_deselected(items=[item for item in items if part not in parts_of(item)])
        items[:] = [item for item in items if part in parts_of(item)]


def pytest_collection_finish() -> None:
    """Python searches what tests leave for garbage, and not all of the frameworks again: a seventh of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def misplaced_slow_tests(request: pytest.FixtureRequest) -> list[str]:
    return request.config.stash[MISPLACED]


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What failing jobs and launchers leave behind lies in pytest's own folder, of which it keeps the last three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(autouse=True)
def printed_log() -> Iterator[None]:
    """What is logged is printed, as on the command line, so that `capsys` sees it."""
    with printed():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real and golden data kept next to the project; absent on a fresh machine."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: golden and real data live next to the project, not in it")
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A toy job that tests read and do not change."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(params=["torch", "mindspore"])
def framework(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return require_framework(request.param)
